"""Two ways to climb the diversity of a group: the paper's loop over the tokens, and the same loop on B × B matrices."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .kernel import cosine_kernel
from .objectives import OBJECTIVES, density_matrix

PARALLEL = 1e-14  # samples whose cosine is this close to 1 are equal as far as float64 can tell


@np.errstate(all="ignore")  # a push out of range is reported by the caller
def mixing_matrix(gram: np.ndarray, strength: float | None, scale: float | None, iterations: int,
                  objective: str | Callable, reg: float) -> tuple[np.ndarray, float]:
    """M steps of Eq. 2 in Gram space: gram (g, B, B) float64, G = C Cᵀ → E (g, B, B) with C_M = C + E C, and the
    largest norm of a sample of C_M (infinity where float64 does not hold it).

    The objective depends on the vectors only through their inner products, and its gradient is a combination of the
    same B vectors, ∂H/∂c_i = Σ_j D_ij c_j (`gradient_matrix`). So each step is A ← A + L D A with A = I + E, and the
    next Gram matrix is A G Aᵀ. The length L is η / M, or with `strength` s such that ‖L D A C‖ = s / M ‖C‖ (Frobenius
    norms over the group); where the gradient is zero, L is 0.
    """
    mixing, identity, now = np.zeros_like(gram), np.eye(gram.shape[-1]), gram
    length, squared = (scale or 0) / iterations, np.trace(gram, axis1=-2, axis2=-1)
    for _ in range(iterations):
        d = gradient_matrix(now, objective, reg)
        if strength is not None:
            moved = (d @ now * d).sum((-2, -1))  # ‖D A C‖², 0 where all samples coincide, up to rounding
            length = (strength / iterations * np.sqrt(squared / np.where(moved > 0, moved, np.inf)))[:, None, None]
        mixing = mixing + length * (d + d @ mixing)
        now = (identity + mixing) @ gram @ (identity + mixing).swapaxes(-1, -2)
        if not np.isfinite(now).all():
            return mixing, np.inf
    return mixing, np.sqrt(np.diagonal(now, axis1=-2, axis2=-1).max())


def gradient_matrix(gram: np.ndarray, objective: str | Callable, reg: float) -> np.ndarray:
    """D with ∂H/∂c_i = Σ_j D_ij c_j: gram (g, B, B) → (g, B, B). `objective`: a name, or f′ (`objectives`).

    With r_i = |c_i|⁻¹, K_ij = r_i r_j G_ij and W = ∂H/∂K, the chain rule through the cosine gives
    ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i). W_ii is 0, since K_ii is 1 whatever c_i is. W_ij of a pair that
    coincides is set to 0: its term is 0, and its rounding error would grow with every step.
    """
    b, identity = gram.shape[-1], np.eye(gram.shape[-1])
    if objective == "spread":
        return np.broadcast_to(identity - 1 / b, gram.shape)
    diagonal = np.arange(b)
    squared = gram[..., diagonal, diagonal]
    r = np.where(squared > 0, squared, np.inf) ** -0.5  # a zero vector has no direction and repels no sample
    outer = r[..., :, None] * r[..., None, :]
    kernel = gram * outer
    kernel[..., diagonal, diagonal] = 1
    derivative = OBJECTIVES[objective][1] if isinstance(objective, str) else objective
    w = derivative(density_matrix(kernel, identity, reg)) * (kernel < 1 - PARALLEL) / (b * (1 + reg))
    d = 2 * outer * w
    d[..., diagonal, diagonal] = -2 * r * r * (w * kernel).sum(-1)
    return d


def ascend_autograd(vectors: Tensor, strength: float | None, scale: float | None, iterations: int, objective: str,
                    reg: float) -> Tensor:
    """The paper's loop, Eq. 2, by automatic differentiation: vectors (g, B, D) → (g, B, D), in their own dtype.

    M times c ← c + (η / M) ∂H/∂c, or with `strength` a step of s / M times the group's length. What tests compare the
    Gram solver with. In float32 the displacement of real tokens is off by about 2e-3: their kernel is close to all
    ones, and H depends on the difference.
    """
    c, norm = vectors, vectors.flatten(1).norm(dim=1)
    for _ in range(iterations):
        c = c.clone().requires_grad_()
        if objective == "spread":
            value = (c - c.mean(1, keepdim=True)).square().sum() / 2
        else:
            density = density_matrix(cosine_kernel(c), c.new_tensor(np.eye(c.shape[1])), reg)
            value = OBJECTIVES[objective][0](density).sum()
        (gradient,) = torch.autograd.grad(value, c)
        length = (scale or 0) / iterations
        if strength is not None:
            moved = gradient.flatten(1).norm(dim=1)
            least = 1e-9 * (norm if objective == "spread" else 1 / norm)  # below it the gradient is rounding error
            length = (strength / iterations * norm / torch.where(moved > least, moved, torch.inf))[:, None, None]
        c = (c + length * gradient).detach()
    return c
