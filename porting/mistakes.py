"""What the usual mistakes make of the kit's own tensors, so that one can be told by its result.

Each takes tensors as the kit has them, float64, and returns what a port with that mistake would have.
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmdit.position import rotate


def features(timestep: Tensor, per_unit: float = 1000.0, last: int = 0) -> Tensor:
    """Timestep features (b,) → (b, 256); `last` 1: the last frequency is 1/10000, not the one before it."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / (128 - last))
    angles = per_unit * timestep.double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def halves(x: Tensor, angles: Tensor) -> Tensor:
    """Rotated in pairs (j, j + k/2) of a head, not in neighboring ones: x as it is after the right rotation."""
    first, second = rotate(x, -angles).chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def transposed_heads(x: Tensor) -> Tensor:
    """Split as (k h), not as (h k): (b, h, n, k) → the same shape."""
    return rearrange(rearrange(x, "b h n k -> b n (h k)"), "b n (k h) -> b h n k", h=x.shape[1])


def patches(latent: Tensor, order: str, p: int) -> Tensor:
    """`order` of a patch's numbers: (b, c, H, W) → (b, m, c · p · p)."""
    return rearrange(latent, f"b c (rows p) (columns q) -> b (rows columns) ({order})", p=p, q=p)


def picture(found: Tensor, latent: Tensor, order: str, p: int) -> Tensor:
    """The inverse of `patches`, for a latent of this shape."""
    sizes = {"rows": latent.shape[2] // p, "p": p, "q": p}
    return rearrange(found, f"b (rows columns) ({order}) -> b c (rows p) (columns q)", **sizes)


def other_pad(ours: Tensor, theirs: Tensor) -> Tensor:
    """Ids that end in another pad token, theirs."""
    return torch.where((ours == ours[:, -1:]) & (theirs == theirs[:, -1:]), theirs, ours)
