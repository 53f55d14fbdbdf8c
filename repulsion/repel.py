"""`repel`: one group or several of contextual tokens in, the same tokens further apart out."""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .objectives import NAMES
from .solvers import ascend_autograd, mixing_matrix

LEAST = {"cpu": 1 << 16}  # numbers: what a core's cache holds; a GPU is given more, whose kernels take long to start


def check_settings(strength, scale, iterations, objective, kernel_reg, solver, **choices: tuple[str, tuple]) -> None:
    """Raises ValueError naming the setting that is out of range; `choices`: name = (value, what it may be)."""
    if (strength is None) == (scale is None):
        raise ValueError("repulsion needs a strength or a scale" + (", not both" if scale is not None else ""))
    for name, value in (("strength", strength), ("scale", scale)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"repulsion {name} must be a finite number, 0 or more, got {value}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"repulsion iterations must be at least 1, a whole number, got {iterations}")
    if not 0 < kernel_reg < float("inf"):
        raise ValueError(f"repulsion kernel_reg must be a finite number above 0, got {kernel_reg}")
    choices |= {"objective": (objective, NAMES), "solver": (solver, ("gram", "autograd"))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"repulsion {name} must be one of {', '.join(allowed)}, got {value!r}")


@torch.no_grad()
def repel(tokens: Tensor, scale: float | None, iterations: int, *, strength: float | None = None,
          objective: str = "vendi", kernel_reg: float = 1e-4, solver: str = "gram", groups: int = 1,
          last_group: bool = False, first: int | None = None,
          gram: Callable[[Tensor], np.ndarray] | None = None) -> Tensor:
    """Push the samples of each group apart (paper Eq. 2): tokens (groups · B, N, D) → the same shape and dtype.

    A sample's N tokens are one vector of N · D numbers. The push goes along the gradient of the objective in
    `iterations` steps (M). Its length is given by `scale` (η, the step size of the paper, whose unit depends on the
    model) or by `strength`: the push of a group is that many times as long as the group's tokens, in M steps of
    strength / M. `last_group` pushes the last group alone, `first` only the first so many tokens of each sample; the
    others are returned as they are. Solver "gram" computes the push on B × B matrices in float64 and touches the
    tokens twice; "autograd" is the paper's loop in float64. The result is rounded to the tokens' dtype once. `gram`
    replaces `gram_matrix` where other processes hold the rest of the features D (`sampler.ranks`).

    strength or scale 0 and a group of one return the tokens unchanged. Samples that coincide cannot be told apart: they
    move alike, and where all coincide, none moves. A zero vector has no cosine: it stays zero and repels no sample,
    except under "spread", which moves it like any other. Raises ValueError for no tokens, NaN or infinite tokens, a
    batch that is no multiple of `groups`, settings out of range, and a push beyond the range of the tokens' dtype.
    """
    check_settings(strength, scale, iterations, objective, kernel_reg, solver)
    if tokens.ndim != 3 or not tokens.numel() or groups < 1 or len(tokens) % groups or not tokens.is_floating_point():
        raise ValueError(f"tokens must be (groups · B, N, D), floating point, with groups = {groups}, got "
                         f"{tuple(tokens.shape)}, {tokens.dtype}")
    if not (strength or scale) or len(tokens) == groups or first == 0:
        return tokens
    device, samples = tokens.device, len(tokens) // groups
    tokens = tokens.detach().to("cpu" if device.type == "mps" else device)  # MPS has no float64
    result = tokens.clone() if last_group or first is not None else torch.empty_like(tokens)
    part = slice(len(tokens) - samples if last_group else 0, None), slice(first)
    c, target = (rearrange(x[part], "(g b) n d -> g b n d", b=samples) for x in (tokens, result))
    gram = (gram or gram_matrix)(c)
    if not np.isfinite(gram).all():  # a token that is NaN or infinite makes it so
        raise ValueError("tokens hold NaN or infinity: the transformer overflowed before the repulsion (try bfloat16), "
                         "or its weights hold NaN (python -m weights FILE --check)")
    settings = strength, scale, iterations, objective, kernel_reg
    if solver == "gram":
        mixing, norm = mixing_matrix(gram, *settings)
        mixed = torch.from_numpy(np.eye(samples) + mixing).to(tokens.device)
        for source, place in zip(chunks(c), chunks(target), strict=True):
            place.copy_((mixed @ source.flatten(2).double()).view_as(source))  # C + E C, the samples of a group mixed
    else:
        with torch.inference_mode(False), torch.enable_grad():
            pushed, norm = ascend_autograd(c.flatten(2).double().clone(), *settings), np.inf
        target.copy_(pushed.view_as(c))
    # no number exceeds the norm of its vector: only where that norm exceeds the range is the result read
    if not norm <= torch.finfo(tokens.dtype).max and not torch.isfinite(result).all():
        raise ValueError(f"the push exceeds the range of {tokens.dtype}: lower the strength or scale, or use bfloat16")
    return result.to(device)


def gram_matrix(c: Tensor) -> np.ndarray:
    """Inner products of every pair, summed in float64: c (g, B, N, D) → (g, B, B)."""
    gram = torch.zeros(len(c), c.shape[1], c.shape[1], dtype=torch.float64, device=c.device)
    for source in chunks(c):
        wide = source.flatten(2).double()
        gram += wide @ wide.mT
    return gram.numpy(force=True)


def chunks(c: Tensor) -> tuple[Tensor, ...]:
    """(g, B, N, D) in pieces along N, so that what is widened to float64 at a time is small beside the tokens.

    A piece has no fewer numbers than LEAST.
    """
    least = LEAST.get(c.device.type, 1 << 22)
    return c.split(max(-(-least // c[:, :, 0].numel()), c.shape[2] // 48), dim=2)
