"""How alike a group of samples is: cosine kernel, von Neumann entropy, Vendi score."""

import torch
from torch import Tensor


def cosine_kernel(vectors: Tensor) -> Tensor:
    """Cosine of every pair: vectors (…, B, D) → kernel (…, B, B) with ones on the diagonal (paper Eq. 3).

    Works in the dtype of its input. A zero vector has no direction: its cosine with every other vector is 0.
    """
    norms = vectors.norm(dim=-1, keepdim=True)
    units = vectors / torch.where(norms > 0, norms, torch.inf)
    identity = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    return (units @ units.mT) * (1 - identity) + identity


def von_neumann_entropy(kernel: Tensor) -> Tensor:
    """Entropy −Σ λ log λ of the eigenvalues of K / tr K, in nats: (…, B, B) → (…), from 0 to log B (paper Eq. 4)."""
    density = kernel / kernel.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return torch.special.entr(torch.linalg.eigvalsh(density).clamp(min=0)).sum(-1)


def vendi_score(vectors: Tensor) -> Tensor:
    """The effective number of samples, exp H: vectors (…, B, D) → (…), from 1 (all alike) to B (all orthogonal).

    Friedman and Dieng, "The Vendi Score" (2023), with the cosine kernel, computed in float64.
    """
    return von_neumann_entropy(cosine_kernel(vectors.double())).exp()
