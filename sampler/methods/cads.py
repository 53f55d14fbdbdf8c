"""CADS: noise on what the transformer reads of the prompt, much at first and none in the end.

Sadat et al., "CADS: Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling",
arXiv:2310.17347.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..guidance import Condition, GuidedVelocity
from ..schedule import Velocity, starting_noise
from .method import Method


@dataclass(frozen=True)
class CADS(Method):
    """y′ = √γ y + s √(1 − γ) ε, brought back to y's mean and standard deviation, for y context and pooled vector.

    γ(σ) is 1 up to τ₁, 0 from τ₂ on, linear between. Then y″ = (y′ − mean y′) / std y′ · std y + mean y, and
    ψ y″ + (1 − ψ) y′ is read. ε is new in each step; that of image i depends on the seed, the step and i alone.

    strength: s. With ψ = 1 it matters only while γ lies between 0 and 1: above τ₂ all is noise, whatever s.
    start, stop: τ₁ and τ₂ in σ, 0 ≤ τ₁ < τ₂ ≤ 1
    mix: ψ, 0 to 1

    Only the conditional branch is noised: it is the condition that is annealed, and the other branch has none. Some
    ports, such as sd-webui-cads, noise the negative prompt as well.
    """

    strength: float = 0.25
    start: float = 0.3
    stop: float = 0.8
    mix: float = 1.0
    ranges: ClassVar = {"mix": (0, 1)}

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"CADS's start and stop must be 0 ≤ start < stop ≤ 1, got {self.start} and {self.stop}")

    def velocity(self, velocity: GuidedVelocity, sigmas: Tensor) -> Velocity:
        return replace(velocity, condition=self.annealed(velocity.condition, velocity.seed))

    def annealed(self, condition: Condition, seed: int) -> Condition:
        def annealed(samples: int, sigma: float, step: int) -> tuple[Tensor, Tensor | None]:
            texts = [text for text in condition(samples, sigma, step) if text is not None]
            gamma = min(max((self.stop - sigma) / (self.stop - self.start), 0), 1)
            if gamma == 1 or self.strength == 0:
                return (*texts, None)[:2]
            sizes = [text[0].numel() for text in texts]
            fresh = starting_noise(-1 - 10_000 * seed - step, samples, (sum(sizes),))  # below 0: not a picture's noise
            texts = [torch.cat([y[:-samples], self.anneal(y[-samples:], noise.view_as(y[-samples:]), gamma)])
                     for y, noise in zip(texts, fresh.split(sizes, dim=1), strict=True)]
            return (*texts, None)[:2]

        return annealed

    def anneal(self, y: Tensor, noise: Tensor, gamma: float) -> Tensor:
        """What y (b, …) becomes at γ, in its dtype; mean and standard deviation are those of each sample."""
        y, dtype = y.float(), y.dtype
        noised = math.sqrt(gamma) * y + self.strength * math.sqrt(1 - gamma) * noise.to(y.device)
        (mean, std), (noised_mean, noised_std) = moments(y), moments(noised)
        rescaled = (noised - noised_mean) / noised_std * std + mean
        return (self.mix * rescaled + (1 - self.mix) * noised).to(dtype)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample of (b, …), to be broadcast."""
    axes = tuple(range(1, y.ndim))
    return y.mean(axes, keepdim=True), y.std(axes, keepdim=True)
