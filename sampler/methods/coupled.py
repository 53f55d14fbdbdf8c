"""Coupled noise: the starting noises of a batch are negatively correlated, and each is still standard normal.

Jia, Shen and Wang, "Couple to Control: Joint Initial Noise Design in Diffusion Models", arXiv:2605.11311. Our reading
of its repulsive coupling: the same correlation for all pairs, at most the most negative that there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .method import Method


@dataclass(frozen=True)
class CoupledNoise(Method):
    """x_i = a (g_i − κ mean g) with variance 1 and, for every pair of the B samples, correlation −s / (B − 1).

    These two give κ = 1 − √((B − 1)(1 − s) / (B − 1 + s)) and a² = (B − 1 + s) / (B − 1). At s = 1 that is
    √(B / (B − 1)) (g_i − mean g), and the noises of the batch sum to 0.

    strength: s, 0 (independent noise) to 1
    """

    strength: float = 1.0
    ranges: ClassVar = {"strength": (0, 1)}

    def noise(self, draw: Callable[[int], Tensor], images: int) -> Tensor:
        noise, s, others = draw(images), self.strength, images - 1
        if s == 0 or others == 0:
            return noise
        kappa = 1 - math.sqrt(others * (1 - s) / (others + s))
        return math.sqrt((others + s) / others) * (noise - kappa * noise.mean(0))
