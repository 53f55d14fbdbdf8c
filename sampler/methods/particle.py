"""Particle guidance: the latents of a batch repel each other through a kernel.

Corso et al., "Particle Guidance: non-I.I.D. Diverse Sampling with Diffusion Models", arXiv:2310.13102.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .kernels import as_vectors, median_of_pairs, squared_distances, weighted_differences
from .method import Steering, score_to_velocity


@dataclass(frozen=True)
class ParticleGuidance(Steering):
    """score_i += c ∇_{x_i} log Φ with log Φ = −Σ_{i<j} k_ij and k_ij = exp(−|x_i − x_j|² / h), on the noisy latents.

    h = median² / log B of the pairs' distances, B samples; it counts as a constant. In closed form
    ∇_{x_i} log Φ = (2 / h) Σ_j k_ij (x_i − x_j), and the velocity changes as `score_to_velocity` says.

    strength: c / d, d the numbers in a latent: h grows as d does, so a strength means the same at every size
    low: acts at σ ≥ low. The authors' program stops where there is less noise than picture, which is σ = 1/2.
    """

    strength: float = 0.5
    low: float = 0.5
    ranges: ClassVar = {"low": (0, 1)}

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        if self.strength == 0 or sigma < self.low or len(x) == 1:
            return velocity
        vectors = as_vectors(x)
        push = score_to_velocity(sigma) * self.strength * vectors.shape[1] * log_potential_gradient(vectors)
        return velocity - push.view_as(x).to(velocity.dtype)


def log_potential_gradient(vectors: Tensor) -> Tensor:
    """∇ log Φ for every sample: (b, d) → (b, d)."""
    squared = squared_distances(vectors)
    h = median_of_pairs(squared) / math.log(len(vectors))
    return weighted_differences(2 / h * (-squared / h).exp(), vectors)
