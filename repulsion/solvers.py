"""Two ways to climb the diversity of a group: the paper's loop over the tokens, and the same loop in Gram space."""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernel import cosine_kernel
from .objectives import density_matrix

Objective = Callable[[Tensor], Tensor]
SAME = 1e-14  # samples whose cosine is this close to 1 coincide as far as float64 can tell
CHUNK = 1 << 18  # columns widened to float64 at a time


def ascend_autograd(vectors: Tensor, scale: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """The paper's loop, Eq. 2: M times c ← c + (η / M) ∂H/∂c, by automatic differentiation.

    vectors (g, B, D) → (g, B, D), in the dtype of its input. The kernel of real tokens is close to all ones, and H
    lives in the difference: in float32 the displacement is off by about 2e-3.
    """
    c = vectors.detach()
    for _ in range(iterations):
        c = c.clone().requires_grad_()
        diversity = objective(density_matrix(cosine_kernel(c), reg)).sum()
        (gradient,) = torch.autograd.grad(diversity, c)
        c = (c + scale / iterations * gradient).detach()
    return c


def ascend_gram(vectors: Tensor, scale: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """The same M steps without touching the tokens: vectors (g, B, D) → (g, B, D), float64 inside, dtype kept.

    H knows the vectors only through their inner products, and its gradient is a combination of the same B vectors.
    So M steps end at C + E C with a B × B matrix E, which follows from the Gram matrix G = C Cᵀ alone.
    """
    mixing = mixing_matrix(gram_matrix(vectors), scale, iterations, objective, reg).to(vectors.device)
    repelled = torch.empty_like(vectors)
    for source, target in zip(vectors.split(CHUNK, -1), repelled.split(CHUNK, -1), strict=True):
        wide = source.double()
        target.copy_(wide.baddbmm(mixing, wide))
    return repelled


def gram_matrix(vectors: Tensor) -> Tensor:
    """Inner products of every pair, summed in float64: vectors (g, B, D) → (g, B, B) on the CPU."""
    g, b, _ = vectors.shape
    gram = torch.zeros(g, b, b, dtype=torch.float64, device=vectors.device)
    for chunk in vectors.split(CHUNK, -1):
        wide = chunk.double()
        gram.baddbmm_(wide, wide.mT)
    return gram.cpu()


def mixing_matrix(gram: Tensor, scale: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """M steps of Eq. 2 in Gram space: gram (g, B, B) float64 → E (g, B, B) with C_M = C + E C.

    With r_i = |c_i|⁻¹, K_ij = r_i r_j G_ij and W = ∂H/∂K (its diagonal 0, since K_ii is 1 whatever c_i is), the
    chain rule through the cosine gives ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j.
    The term of a pair that coincides is 0; it is left out, or its rounding error would grow with every step.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    off_diagonal = 1 - identity
    mixing = torch.zeros_like(gram)
    for _ in range(iterations):
        current = identity + mixing
        now = current @ gram @ current.mT
        squared = now.diagonal(dim1=-2, dim2=-1)
        r = torch.where(squared > 0, squared, torch.inf).rsqrt()  # a zero vector neither pushes nor moves
        outer = r[..., :, None] * r[..., None, :]
        kernel = (now * outer * off_diagonal + identity).requires_grad_()
        with torch.enable_grad():
            (w,) = torch.autograd.grad(objective(density_matrix(kernel, reg)).sum(), kernel)
        w = w * off_diagonal * (kernel < 1 - SAME)
        d = 2 * (outer * w - torch.diag_embed(r.square() * (w * kernel.detach()).sum(-1)))
        mixing = mixing + scale / iterations * (d @ current)
    return mixing
