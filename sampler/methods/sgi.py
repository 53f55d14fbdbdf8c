"""Group selection: more candidates than pictures are started, and step by step the most diverse group is kept.

Parmar et al., "Scaling Group Inference for Diverse and High-Quality Generation" (SGI), arXiv:2508.15773.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from ..schedule import Velocity
from .method import Method

EXACT = 20_000  # up to this many groups are all looked at: 8 of 16 are 12,870
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GroupSelection(Method):
    """Of M candidates keep, after each step, those that maximize Σ_i quality_i + λ Σ_{i<j} distance_ij.

    M, then ⌈(1 − pruning) M⌉, and so on, never fewer than the pictures asked for, and just these after the last step.
    Both measures see the pictures predicted in the step, as latents x̂₀ = x − σ v. Published are CLIP's agreement with
    the prompt as quality and 1 − cosine of DINO features as distance. Here, by default, all candidates
    have quality 0, and distance is 1 − cosine of the latents themselves. A picture's noise is that of
    its index among the candidates.

    strength: candidates for each picture besides the one: M = (1 + strength) · images, rounded
    pruning: share of the candidates given up after a step, 0 to 1; published 0.5, for few-step models 0.9
    balance: λ, 0 or more; without a quality its value does not matter
    quality: x̂₀ (b, c, H, W) → (b,)
    features: x̂₀ (b, c, H, W) → (b, d), which are compared instead of the latents
    """

    strength: float = 3.0
    pruning: float = 0.5
    balance: float = 1.5
    quality: Measure | None = None
    features: Measure | None = None
    ranges: ClassVar = {"pruning": (0, 1), "balance": (0, math.inf)}

    def noise(self, draw: Callable[[int], Tensor], images: int) -> Tensor:
        return draw(round((1 + self.strength) * images))

    def denoise(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, progress: str | None = None) -> Tensor:
        """The sampling loop, with a choice among the candidates after each step."""
        x, images = noise, round(len(noise) / (1 + self.strength))
        levels = sigmas.tolist()
        for step in trange(len(levels) - 1, desc=progress, disable=progress is None, leave=False):
            v = velocity(x, levels[step], step)
            predicted = x - levels[step] * v
            x = x + (levels[step + 1] - levels[step]) * v
            kept = self.choose(predicted, images, steps_left=len(levels) - 2 - step)
            x = x if kept is None else x[kept]
        return x

    def choose(self, predicted: Tensor, images: int, steps_left: int) -> Tensor | None:
        """Which candidates go on, as indices, or None for all; `predicted` are their pictures x̂₀ = x − σ v."""
        size = max(images, math.ceil((1 - self.pruning) * len(predicted))) if steps_left else images
        if size == len(predicted):
            return None
        vectors = (predicted if self.features is None else self.features(predicted)).flatten(1).double()
        units = F.normalize(vectors, dim=1)
        distance = (1 - units @ units.mT).cpu()
        quality = torch.zeros(len(predicted)) if self.quality is None else self.quality(predicted)
        return best_group(quality.double().cpu(), self.balance * distance, size).to(predicted.device)


def best_group(quality: Tensor, distance: Tensor, size: int) -> Tensor:
    """The group of `size` with the largest Σ_i quality_i + Σ_{i<j} distance_ij, as indices in ascending order.

    quality (m,), distance (m, m) → (size,). Exact where there are at most EXACT groups; else greedy, then the best swap
    again and again until none helps.
    """
    distance = distance - distance.diagonal().diag()
    if math.comb(len(quality), size) <= EXACT:
        groups = torch.tensor(list(combinations(range(len(quality)), size)))
        member = torch.zeros(len(groups), len(quality), dtype=quality.dtype).scatter_(1, groups, 1)
        return groups[(member @ quality + ((member @ distance) * member).sum(1) / 2).argmax()]
    return greedy_group(quality, distance, size)


def greedy_group(quality: Tensor, distance: Tensor, size: int) -> Tensor:
    """As `best_group`, by adding the candidate with the largest gain, then by swaps."""
    chosen = torch.zeros(len(quality), dtype=torch.bool)
    for _ in range(size):
        gain = quality + distance[:, chosen].sum(1)
        gain = gain if chosen.any() else gain + distance.amax(1)  # the first: counted with its best partner
        chosen[gain.masked_fill(chosen, -torch.inf).argmax()] = True
    while True:
        gain = quality + distance[:, chosen].sum(1)  # of each, inside or outside, from the others inside
        inside, outside = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        better = gain[outside] - gain[inside][:, None] - distance[inside][:, outside]  # (inside, outside)
        if better.max() <= 1e-12:
            return inside
        i, j = divmod(better.argmax().item(), len(outside))
        chosen[inside[i]], chosen[outside[j]] = False, True
