"""The results of usual mistakes, computed from the kit's tensors, so that a mistake can be recognized by its result.

Each function takes tensors as the kit has them, in float64, and returns the tensor of a port with that mistake.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmdit.position import rotate
from repulsion import Repulsion
from repulsion.solvers import gradient_matrix

Ratio = Callable[[np.ndarray, np.ndarray], np.ndarray | float]


def features(level: Tensor, per_unit: float = 1000.0, last: int = 0) -> Tensor:
    """Features of a noise level or guidance: (b,) → (b, 256). With `last` = 1 the frequencies end at 1/10000."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / (128 - last))
    angles = per_unit * level.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotate_back(x: Tensor, rope: Tensor, times: int = 1) -> Tensor:
    """x (b, h, n, k), which was rotated, rotated back: once to what it was before, twice to the opposite rotation."""
    for _ in range(times):
        x = rotate(x, torch.stack([rope[0], -rope[1]]))
    return x


def halves(x: Tensor, rope: Tensor) -> Tensor:
    """x (b, h, n, k), which was rotated in pairs of neighbors, rotated in pairs (j, j + k/2) instead."""
    (cos, sin), (first, second) = rope, rotate_back(x, rope).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def transposed_heads(x: Tensor) -> Tensor:
    """Split as (k h), not as (h k): (b, h, n, k) → the same shape."""
    return rearrange(rearrange(x, "b h n k -> b n (h k)"), "b n (k h) -> b h n k", h=x.shape[1])


def patches(latent: Tensor, order: str, p: int) -> Tensor:
    """The values of each patch in this order: (b, c, H, W) → (b, m, c · p · p)."""
    return rearrange(latent, f"b c (rows p) (columns q) -> b (rows columns) ({order})", p=p, q=p)


def picture(found: Tensor, latent: Tensor, order: str, p: int) -> Tensor:
    """The inverse of `patches`, for a latent of this shape."""
    pattern = f"b (rows columns) ({order}) -> b c (rows p) (columns q)"
    return rearrange(found, pattern, rows=latent.shape[2] // p, p=p, q=p)


def other_pad(ours: Tensor, theirs: Tensor) -> Tensor:
    """Our ids, padded with the token that theirs end in."""
    return torch.where((ours == ours[:, -1:]) & (theirs == theirs[:, -1:]), theirs, ours)


def mixing_with(gram: Tensor, r: Repulsion, ratio: Ratio, iterations: int) -> Tensor:
    """The mixing matrix (g, B, B) of steps of length s / M · ratio(G, N) (or η / M · …), with G = C Cᵀ before the push
    and N = S Sᵀ of the step's direction S = D A C."""
    g, a = gram.numpy(), np.eye(gram.shape[-1])
    for _ in range(iterations):
        step = gradient_matrix(a @ g @ a.swapaxes(-1, -2), r.objective, r.kernel_reg) @ a
        length = (r.scale if r.strength is None else r.strength) / iterations
        a = a + length * ratio(g, step @ g @ step.swapaxes(-1, -2)) * step
    return torch.from_numpy(a - np.eye(gram.shape[-1]))
