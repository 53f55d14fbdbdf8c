"""The joint attention of an MMDiT, where text and image tokens attend to each other, and where samples repel.

Letters, for the whole project: b batch, g group, n context tokens, m image tokens, d width, h heads, k head width,
c latent channels, p patch.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .position import rotate

Push = Callable[[Tensor], Tensor]  # what `Repulsion.bind` returns for a block that repels


class StreamProjections(nn.Module):
    """Per-stream q/k/v projection, RMSNorm of q and k per head, and output projection."""

    def __init__(self, width: int, heads: int, qk_norm: bool, bias: bool = True, out: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width, bias) if out else None

    def to_qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(tokens), "b n (three h k) -> three b h n k", three=3, h=self.heads)
        return self.norm_q(q), self.norm_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None = None) -> Tensor:
    """Softmax attention, heads joined again: three (b, h, n, k) → (b, n, h · k). `rope` rotates q and k."""
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n k -> b n (h k)")


class JointAttention(nn.Module):
    """Two streams, one softmax (SD3 section 4; Eq. 1 of contextual repulsion: f̂_T, f̂_I = MM-Attn(f_T, f_I)).

    context (b, n, d) and image (b, m, d) → the same shapes; the context is None where `context_out` is False (the
    last block of SD3, whose context output is unused).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, bias: bool = True, context_out: bool = True):
        super().__init__()
        self.context = StreamProjections(width, heads, qk_norm, bias, out=context_out)
        self.image = StreamProjections(width, heads, qk_norm, bias)

    def forward(self, context: Tensor, image: Tensor, rope: Tensor | None = None,
                push: Push | None = None) -> tuple[Tensor | None, Tensor]:
        n = context.shape[1]
        streams = zip(self.context.to_qkv(context), self.image.to_qkv(image), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in streams)  # the context first, then the image
        joint = attend(q, k, v, rope)
        image = self.image.out(joint[:, n:])
        if self.context.out is None:
            return None, image
        context = self.context.out(joint[:, :n])
        if push:
            context = push(context)  # Eq. 2: the samples of a group repel each other in the contextual space
        return context, image


class SelfAttention(StreamProjections):
    """Attention among image tokens alone: (b, m, d) → (b, m, d), the second attention of SD3.5-medium."""

    def forward(self, image: Tensor) -> Tensor:
        return self.out(attend(*self.to_qkv(image)))
