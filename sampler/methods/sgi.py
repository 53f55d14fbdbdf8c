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


@dataclass(frozen=True)
class GroupSelection(Method):
    """Of M candidates keep, after each step, those that maximize Σ_{i<j} (1 − cos(x̂_i, x̂_j)).

    M, then ⌈(1 − pruning) M⌉, and so on, never fewer than the pictures asked for, and just these after the last step.
    x̂ = x − σ v is the picture predicted in the step, as a latent. The published sum has DINO features in its place, and
    a quality of each candidate, CLIP's agreement with the prompt. A picture's noise is that of its index among the
    candidates.

    strength: candidates for each picture besides the one: M = (1 + strength) · images, rounded
    pruning: share of the candidates given up after a step, 0 to 1; published 0.5, for few-step models 0.9
    """

    strength: float = 3.0
    pruning: float = 0.5
    ranges: ClassVar = {"pruning": (0, 1)}

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
            x = x[self.choose(predicted, images, steps_left=len(levels) - 2 - step)]
        return x

    def choose(self, predicted: Tensor, images: int, steps_left: int) -> Tensor:
        """Which candidates go on, as indices; `predicted` are their pictures x̂₀ = x − σ v."""
        size = max(images, math.ceil((1 - self.pruning) * len(predicted))) if steps_left else images
        units = F.normalize(predicted.flatten(1).double(), dim=1)
        return best_group((1 - units @ units.mT).cpu(), size).to(predicted.device)


def best_group(distance: Tensor, size: int) -> Tensor:
    """The group of `size` with the largest Σ_{i<j} distance_ij, as indices in ascending order.

    distance (m, m) → (size,). Exact where there are at most EXACT groups; else greedy, then the best swap again and
    again until none helps.
    """
    distance = distance - distance.diagonal().diag()
    if math.comb(len(distance), size) <= EXACT:
        groups = torch.tensor(list(combinations(range(len(distance)), size)))
        member = torch.zeros(len(groups), len(distance), dtype=distance.dtype).scatter_(1, groups, 1)
        return groups[((member @ distance) * member).sum(1).argmax()]
    return greedy_group(distance, size)


def greedy_group(distance: Tensor, size: int) -> Tensor:
    """As `best_group`, by adding the candidate with the largest gain, then by swaps."""
    chosen = torch.zeros(len(distance), dtype=torch.bool)
    for _ in range(size):
        gain = distance[:, chosen].sum(1)
        gain = gain if chosen.any() else gain + distance.amax(1)  # the first: counted with its best partner
        chosen[gain.masked_fill(chosen, -torch.inf).argmax()] = True
    while True:
        gain = distance[:, chosen].sum(1)  # of each, inside or outside, from the others inside
        inside, outside = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        better = gain[outside] - gain[inside][:, None] - distance[inside][:, outside]  # (inside, outside)
        if better.max() <= 1e-12:
            return inside
        i, j = divmod(better.argmax().item(), len(outside))
        chosen[inside[i]], chosen[outside[j]] = False, True
