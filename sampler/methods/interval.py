"""Interval guidance: no guidance at high noise, where the content of the picture is decided.

Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
Models", arXiv:2404.07724.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..schedule import Velocity
from .method import Method


@dataclass(frozen=True)
class IntervalGuidance(Method):
    """The guidance's weight where low < σ ≤ 1 − strength, and 1, the prompt alone, everywhere else.

    It holds for classifier-free guidance, whose second branch is then left out, and for guidance that a model was
    distilled with. Raises ValueError in a call without either.

    strength: the share of the noise levels, from σ = 1 down, that goes without guidance; 0 to 1
    low: the noise level at which guidance ends, 0 to 1
    """

    strength: float = 0.3
    low: float = 0.0
    ranges: ClassVar = {"strength": (0, 1), "low": (0, 1)}

    def check(self, guided: bool) -> None:
        if not guided:
            raise ValueError("IntervalGuidance needs guidance to limit: a guidance above 1, with FLUX.1-schnell a "
                             "true_guidance above 1")

    def velocity(self, velocity: Velocity, sigmas: Tensor) -> Velocity:
        def in_interval(x: Tensor, sigma: float, step: int) -> Tensor:
            return velocity(x, sigma, step, guided=self.low < sigma <= 1 - self.strength)

        return in_interval
