"""SPARKE: the latents descend the kernel matrix's Frobenius norm, which climbs their order-2 Rényi entropy.

Jalali et al., "SPARKE: Scalable Prompt-Aware Diversity Guidance in Diffusion Models via RKE Score", arXiv:2506.10173.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .kernels import as_vectors, squared_distances, weighted_differences
from .method import Steering


@dataclass(frozen=True)
class SPARKE(Steering):
    """After a step x ← x − η ∇L with L = Σ_ij k_ij² / B² and k_ij = exp(−|u_i − u_j|² / 2s²), u_i = x_i / |x_i|.

    Samples of one prompt have prompt similarity 1. As in the authors' program the latents are compared as unit vectors,
    one step of several is pushed, and η is what makes the push a share of the latent's length. Theirs moves one sample
    at a time; here the group moves at once, by that share of the group's length, so that a sample far from all others
    moves less.

    strength: that share
    bandwidth: s, above 0; unit vectors are 0 to 2 apart, independent noise √2
    every: acts in the steps 0, every, 2 · every, … (the authors: one of ten, in runs of 50)
    """

    strength: float = 0.1
    bandwidth: float = 0.8
    every: int = 4
    ranges: ClassVar = {"bandwidth": (1e-3, math.inf), "every": (1, math.inf)}

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        if self.strength == 0 or step % self.every or len(x) == 1:
            return velocity
        vectors = as_vectors(x + (next_sigma - sigma) * velocity)  # where the plain step would end
        gradient = frobenius_gradient(vectors, self.bandwidth)
        if not gradient.norm() > 0:  # all coincide: no direction to leave in
            return velocity
        shift = -self.strength * vectors.norm() / gradient.norm() * gradient
        return velocity + (shift / (next_sigma - sigma)).view_as(x).to(velocity.dtype)


def frobenius_gradient(vectors: Tensor, bandwidth: float) -> Tensor:
    """∇L for every sample: (b, d) → (b, d).

    ∂L/∂u_i = −4 / (B² s²) Σ_j k_ij² (u_i − u_j); of it, x_i feels what is across u_i, over |x_i|.
    """
    length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)
    u = vectors / length
    squared_kernel = (-squared_distances(u) / bandwidth**2).exp()
    gradient = -4 / (len(u) * bandwidth) ** 2 * weighted_differences(squared_kernel, u)
    return (gradient - (gradient * u).sum(1, keepdim=True) * u) / length
