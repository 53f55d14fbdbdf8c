"""What repulsion climbs: functions of the density matrix K̃ that are larger the more different the samples are.

Each takes K̃ (…, B, B), symmetric, positive definite, of trace 1, and returns (…). Both solvers differentiate these
very functions, so a new objective is one function and one row in `OBJECTIVES`.
"""

import torch
from torch import Tensor


def density_matrix(kernel: Tensor, reg: float) -> Tensor:
    """K̃ = (K + ε I) / (B (1 + ε)): trace 1, and log λ stays finite when samples coincide."""
    b = kernel.shape[-1]
    identity = torch.eye(b, dtype=kernel.dtype, device=kernel.device)
    return (kernel + reg * identity) / (b * (1 + reg))


def vendi(density: Tensor) -> Tensor:
    """Von Neumann entropy −Σ λ log λ (paper Eq. 4), from 0 to log B."""
    return torch.special.entr(torch.linalg.eigvalsh(density)).sum(-1)


def dpp(density: Tensor) -> Tensor:
    """Log-determinant Σ log λ, the likelihood of a determinantal point process (DiverseFlow), up to −B log B."""
    return torch.logdet(density)


def rke(density: Tensor) -> Tensor:
    """Order-2 Rényi entropy −log Σ λ² (SPARKE), from 0 to log B."""
    return -density.square().sum((-2, -1)).log()


def cosine(density: Tensor) -> Tensor:
    """Minus the mean similarity of a pair (the form of particle guidance), from −1 to 1 / (B − 1)."""
    trace = density.diagonal(dim1=-2, dim2=-1).sum(-1)
    return -(density.sum((-2, -1)) - trace) / (density.shape[-1] - 1)


OBJECTIVES = {"vendi": vendi, "dpp": dpp, "rke": rke, "cosine": cosine}
