"""What the methods with an RBF kernel share: distances, bandwidth, and the sum that every kernel gradient is."""

import torch
from torch import Tensor


def as_vectors(x: Tensor) -> Tensor:
    """Latents (b, c, H, W) as float64 vectors (b, d)."""
    return x.flatten(1).double()


def squared_distances(vectors: Tensor) -> Tensor:
    """|x_i − x_j|² of every pair, summed directly, so that near vectors keep their digits: (b, d) → (b, b)."""
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()


def median_of_pairs(squared: Tensor) -> Tensor:
    """The median over the pairs i < j of (b, b), b at least 2; infinite where it is 0, so that no sample moves."""
    i, j = torch.triu_indices(len(squared), len(squared), offset=1)
    median = squared[i, j].quantile(0.5)
    return torch.where(median > 0, median, torch.inf)


def weighted_differences(weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ_j w_ij (x_i − x_j): weights (b, b), vectors (b, d) → (b, d).

    The gradient of every function of an RBF kernel is of this form, since ∂k_ij/∂x_i = −2 k_ij (x_i − x_j) / h.
    """
    return weights.sum(1, keepdim=True) * vectors - weights @ vectors
