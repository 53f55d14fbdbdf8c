"""`Method`: the places in sampling where another way to make a batch diverse may act."""

import math
from dataclasses import dataclass

from torch import Tensor

CAP = 10.0  # the largest factor of `score_to_velocity`, reached at σ = 10 / 11


@dataclass(frozen=True)
class Method:
    """Plain sampling. A method is a subclass that overrides the places where it acts.

    strength: 0 or more; 0 is plain sampling, exactly; its unit differs from method to method

    Raises ValueError naming the field that is out of range.
    """

    strength: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.strength) and self.strength >= 0):
            name = type(self).__name__
            raise ValueError(f"{name}'s strength must be a finite number, 0 or more, got {self.strength}")

    def check(self, guided: bool) -> None:
        """Raises ValueError for a call that the method cannot act in; `guided`: it has guidance of either kind."""

    def candidates(self, images: int) -> int:
        """How many samples to start with, so that `images` are left."""
        return images

    def condition(self, context: Tensor, pooled: Tensor, samples: int, sigma: float, step: int,
                  seed: int) -> tuple[Tensor, Tensor]:
        """What the transformer reads instead of context (branches · samples, n, d) and pooled (branches · samples, d).

        With classifier-free guidance there are two branches, the conditional one last.
        """
        return context, pooled

    def weight(self, weight: float, sigma: float) -> float:
        """The weight of the guidance at a noise level; 1: the prompt alone."""
        return weight

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        """The velocity to follow from σ to the next, instead of the guided one; x, velocity (b, c, H, W)."""
        return velocity

    def choose(self, predicted: Tensor, images: int, steps_left: int) -> Tensor | None:
        """Which samples go on after a step, as indices, or None for all; `predicted` in it are x̂₀ = x − σ v."""
        return None


def score_to_velocity(sigma: float) -> float:
    """The factor by which a term g added to the score is taken from the velocity: v ← v − σ / (1 − σ) · g.

    With x = (1 − σ) x₀ + σ n and v = n − x₀ the predicted noise is n̂ = x + (1 − σ) v, and the score −n̂ / σ. So a score
    larger by g means n̂ smaller by σ g, and v, at the same x, by σ g / (1 − σ). At σ = 1 x is noise alone and its
    score says nothing of the picture: there, and near it, the factor is capped.
    """
    return min(sigma / (1 - sigma), CAP) if sigma < 1 else CAP
