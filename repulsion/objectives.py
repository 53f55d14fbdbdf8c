"""What repulsion climbs: functions of the samples' kernel that are larger the more different the samples are.

Each objective is a pair. f (torch) is its value for the density matrix K̃ (g, B, B), which is symmetric, positive
definite and of trace 1; f′ (numpy) is the derivative ∂f/∂K̃, a symmetric matrix in closed form. The Gram solver uses f′,
the autograd solver differentiates f, and a test compares the two. A new objective is one row of `OBJECTIVES`.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def density_matrix(kernel, identity, reg: float):
    """K̃ = (K + ε I) / (B (1 + ε)): trace 1, and log λ stays finite when samples coincide. Torch or numpy."""
    return (kernel + reg * identity) / (len(identity) * (1 + reg))


def spectral(f: Callable[[Tensor], Tensor], derivative: Callable[[np.ndarray], np.ndarray]) -> tuple:
    """The pair of an objective that depends on the eigenvalues λ of K̃ alone, from f(λ) and f′(λ): U f′(λ) Uᵀ."""

    def matrix(density: np.ndarray) -> np.ndarray:
        eigenvalues, u = (x.numpy() for x in torch.linalg.eigh(torch.from_numpy(density)))  # faster than numpy
        return (u * derivative(eigenvalues)[..., None, :]) @ u.swapaxes(-1, -2)

    return lambda density: f(torch.linalg.eigvalsh(density)), matrix


OBJECTIVES: dict[str, tuple] = {
    # von Neumann entropy (paper Eq. 4), from 0 to log B
    "vendi": spectral(lambda e: torch.special.entr(e).sum(-1), lambda e: -np.log(e) - 1),
    # log-determinant, the log-likelihood of a determinantal point process (DiverseFlow), at most −B log B
    "dpp": spectral(lambda e: e.log().sum(-1), lambda e: 1 / e),
    # order-2 Rényi entropy (SPARKE), from 0 to log B
    "rke": spectral(lambda e: -e.square().sum(-1).log(), lambda e: -2 * e / np.square(e).sum(-1, keepdims=True)),
    # minus the mean cosine of a pair (the form of particle guidance), from −1 to 1 / (B − 1)
    "cosine": (lambda density: (1 - density.sum((-2, -1))) / (density.shape[-1] - 1),
               lambda density: np.full_like(density, -1 / (density.shape[-1] - 1))),
}
# and the control, which is no function of K̃: "spread", half the squared distances from the group's mean
NAMES = (*OBJECTIVES, "spread")
