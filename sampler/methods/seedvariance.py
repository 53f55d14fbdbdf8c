"""Seed variance: uniform noise on half of the numbers of the prompt's embedding in the first steps, then none.

The node SeedVarianceEnhancer of ComfyUI's users (by ChangeTheConstants), read in its version 2.1. Ours: the unit of
strength (the node's is absolute; it suggests 0.1 to 10 standard deviations), and noise of its own for each picture.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..guidance import Condition, GuidedVelocity
from ..schedule import Velocity, starting_noise
from .inside import in_first
from .method import Method


@dataclass(frozen=True)
class SeedVariance(Method):
    """y + s · std y · u · mask for the context y, with u uniform on (−1, 1) and half of the numbers masked out.

    The same noise in every noised step, from the seed and the picture's index alone. Tokens that are all zeros
    (padding, a missing T5) stay zeros, and so do the pooled vector and the other branch of guidance as they are.

    strength: s
    share: of the steps, from the first on, at least one
    """

    strength: float = 2.0
    share: float = 0.2
    ranges: ClassVar = {"share": (0, 1)}

    def velocity(self, velocity: GuidedVelocity, sigmas: Tensor) -> Velocity:
        if self.strength == 0:
            return velocity
        noised = replace(velocity, condition=self.noised(velocity.condition, velocity.seed))

        def varied(x: Tensor, sigma: float, step: int) -> Tensor:
            return (noised if in_first(self.share, step, len(sigmas) - 1) else velocity)(x, sigma, step)

        return varied

    def noised(self, condition: Condition, seed: int) -> Condition:
        def noised(samples: int, sigma: float, step: int) -> tuple[Tensor, Tensor | None]:
            context, pooled = condition(samples, sigma, step)
            y = context[-samples:].float()
            normal, coin = starting_noise(-1 - seed, samples, (2, *y.shape[1:])).to(y.device).unbind(1)
            tokens = (y[0] != 0).any(-1)  # the same of each sample
            noise = self.strength * y[0, tokens].std() * torch.erf(normal / math.sqrt(2)) * (coin > 0)
            noise = noise * tokens[:, None]
            return torch.cat([context[:-samples], (y + noise).to(context.dtype)]), pooled

        return noised
