"""DiverseFlow: the predicted pictures of a batch are made likely under a determinantal point process.

Morshed and Boddeti, "DiverseFlow: Sample-Efficient Diverse Mode Coverage in Flows", CVPR 2025, arXiv:2504.07894.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import as_vectors, median_of_pairs, squared_distances, weighted_differences
from .method import Steering

JITTER = 1e-6  # on the diagonal of L, so that it has an inverse where samples coincide


@dataclass(frozen=True)
class DiverseFlow(Steering):
    """v_i −= s(σ) ∇_{x_i} log det L / det(L + I), L_ij = exp(−|x̂_i − x̂_j|² / h), on the predicted pictures x̂ = x − σ v.

    h is the median over the pairs of |x̂_i − x̂_j|² and counts as a constant; so does v in x̂, so that nothing is
    propagated back through the transformer. In closed form the gradient is −(4 / h) Σ_j M_ij L_ij (x̂_i − x̂_j) with
    M = L⁻¹ − (L + I)⁻¹. s(σ) is a schedule to choose; here it falls with the noise, s(σ) = c σ.

    strength: c / d, d the numbers in a latent: h grows as d does, so a strength means the same at every size
    """

    strength: float = 0.5

    def steer(self, x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, step: int) -> Tensor:
        if self.strength == 0 or len(x) == 1:
            return velocity
        vectors = as_vectors(x - sigma * velocity)
        push = self.strength * vectors.shape[1] * sigma * log_likelihood_gradient(vectors)
        return velocity - push.view_as(x).to(velocity.dtype)


def log_likelihood_gradient(vectors: Tensor) -> Tensor:
    """∇ log det L / det(L + I) for every sample: (b, d) → (b, d)."""
    squared = squared_distances(vectors)
    h = median_of_pairs(squared)
    identity = torch.eye(len(vectors), dtype=vectors.dtype, device=vectors.device)
    kernel = (-squared / h).exp()
    jittered = kernel + JITTER * identity
    m = torch.linalg.inv(jittered) - torch.linalg.inv(jittered + identity)
    return weighted_differences(-4 / h * m * kernel, vectors)
