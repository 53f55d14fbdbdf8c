"""`Method`: another way to make a batch diverse, as a replacement for one of the functions that a run consists of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..guidance import GuidedVelocity
from ..schedule import Velocity, denoise

CAP = 10.0  # the largest factor of `score_to_velocity`, reached at σ = 10 / 11


@dataclass(frozen=True)
class Method:
    """Plain sampling. A method is a subclass that replaces one of the functions a run consists of.

    strength: 0 or more; 0 is plain sampling, exactly; its unit differs from method to method

    Raises ValueError naming the field that is out of range.
    """

    strength: float = 0.0
    ranges: ClassVar[dict[str, tuple[float, float]]] = {}  # field → the least and the most that it may be

    def __post_init__(self):
        name = type(self).__name__
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(f"{name}'s strength must be a finite number, 0 or more, got {self.strength}")
        for field, (least, most) in self.ranges.items():
            value, limits = getattr(self, field), f"{least} or more" if most == math.inf else f"from {least} to {most}"
            if not (math.isfinite(value) and least <= value <= most):
                raise ValueError(f"{name}'s {field} must be a number {limits}, got {value}")

    def check(self, guided: bool) -> None:
        """Raises ValueError for a call that the method cannot act in; `guided`: it has guidance of either kind."""

    def noise(self, draw: Callable[[int], Tensor], images: int) -> Tensor:
        """The noise to start from, for `images` pictures; draw(count) gives (count, c, H, W)."""
        return draw(images)

    def velocity(self, velocity: GuidedVelocity, sigmas: Tensor) -> Velocity:
        """The velocity to follow along the noise levels `sigmas`."""
        return velocity

    denoise = staticmethod(denoise)  # the sampling loop


class Steering(Method):
    """A method that changes the guided velocity."""

    def velocity(self, velocity: Velocity, sigmas: Tensor) -> Velocity:
        levels = sigmas.tolist()

        def steered(x: Tensor, sigma: float, step: int) -> Tensor:
            return self.steer(x, velocity(x, sigma, step), sigma=sigma, next_sigma=levels[step + 1], step=step)

        return steered

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        """The velocity to follow from σ to the next, instead of the guided one; x, velocity (b, c, H, W)."""
        raise NotImplementedError


def score_to_velocity(sigma: float) -> float:
    """The factor by which a term g added to the score is taken from the velocity: v ← v − σ / (1 − σ) · g.

    With x = (1 − σ) x₀ + σ n and v = n − x₀ the predicted noise is n̂ = x + (1 − σ) v, and the score −n̂ / σ. So a score
    larger by g means n̂ smaller by σ g, and v, at the same x, by σ g / (1 − σ). At σ = 1 x is noise alone and its
    score is independent of the picture: there, and near it, the factor is capped.
    """
    return min(sigma / (1 - sigma), CAP) if sigma < 1 else CAP
