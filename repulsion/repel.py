"""`repel`: one group or several of contextual tokens in, the same tokens further apart out."""

import math

import torch
from einops import rearrange
from torch import Tensor

from .objectives import OBJECTIVES
from .solvers import ascend_autograd, ascend_gram, ascend_to

SOLVERS = {"gram": ascend_gram, "autograd": ascend_autograd}


def check_settings(scale: float | None, diversity: float | None, iterations: int, objective: str, kernel_reg: float,
                   solver: str) -> None:
    """Raises ValueError, naming the setting, where one makes no sense."""
    if (scale is None) == (diversity is None):
        raise ValueError("repulsion needs a scale or a diversity" + (", not both" if scale is not None else ""))
    if scale is not None and not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"repulsion scale must be a finite number, 0 or more, got {scale}")
    if diversity is not None and not 0 <= diversity <= 1:
        raise ValueError(f"repulsion diversity must be a number from 0 to 1, got {diversity}")
    if diversity is not None and solver != "gram":
        raise ValueError('repulsion diversity is solved for in Gram space: use solver="gram", or a scale')
    if iterations < 1:
        raise ValueError(f"repulsion iterations must be at least 1, got {iterations}")
    if not (math.isfinite(kernel_reg) and kernel_reg > 0):
        raise ValueError(f"kernel_reg must be a finite number above 0, got {kernel_reg}")
    for name, value, known in (("objective", objective, OBJECTIVES), ("solver", solver, SOLVERS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")


def repel(tokens: Tensor, scale: float | None, iterations: int, *, diversity: float | None = None,
          objective: str = "vendi", kernel_reg: float = 1e-4, solver: str = "gram", groups: int = 1) -> Tensor:
    """Push the samples of each group apart (paper Eq. 2): tokens (groups · B, N, D) → the same shape and dtype.

    A sample's N tokens are one vector of N · D numbers. `scale` is η, `iterations` M. Both solvers work in float64,
    whatever the tokens' dtype, and the result is rounded to that dtype once. `diversity` takes the place of a scale
    (None): the share, 0 to 1, of what the objective lacks to its value for orthogonal samples, for the entropy log B,
    by which each group's is raised; it is solved for, so it means the same in every model, block and step.

    Defined at the edges: scale or diversity 0 or a group of one returns the tokens as they are. Samples that coincide
    have no direction to leave each other in: they move alike, and where all coincide, not at all ("autograd": up to
    its rounding, which a strong push can make visible). A zero vector stays zero and pushes nobody. A diversity out
    of reach along the gradient is approached. Raises ValueError for no tokens, NaN or infinite ones, a batch that is no
    multiple of `groups`, and settings out of range.
    """
    check_settings(scale, diversity, iterations, objective, kernel_reg, solver)
    if tokens.ndim != 3 or not tokens.numel() or groups < 1 or tokens.shape[0] % groups:
        raise ValueError(f"tokens must be (groups · B, N, D) with groups = {groups}, got {tuple(tokens.shape)}")
    if not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point, got {tokens.dtype}")
    if not torch.isfinite(torch.stack(tokens.aminmax())).all():  # both are NaN where one token is
        raise ValueError("tokens hold NaN or infinity: the model overflowed before the repulsion (try bfloat16)")
    if not (scale or diversity) or tokens.shape[0] == groups:
        return tokens
    with torch.inference_mode(False), torch.enable_grad():
        vectors = rearrange(tokens.detach(), "(g b) n d -> g b (n d)", g=groups).clone()
        if solver == "autograd":
            vectors = vectors.double()
        ascend, dose = (SOLVERS[solver], scale) if diversity is None else (ascend_to, diversity)
        repelled = ascend(vectors, dose, iterations, OBJECTIVES[objective], kernel_reg)
    return rearrange(repelled.detach().to(tokens.dtype), "g b (n d) -> (g b) n d", n=tokens.shape[1])
