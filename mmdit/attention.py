"""The joint attention of an MMDiT, where text and image tokens read each other, and where samples repel.

Letters, for the whole project: b batch, g group, n context tokens, m image tokens, d width, h heads, k head width,
c latent channels, p patch.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from repulsion import Repulsion

from .position import rotate


class StreamProjections(nn.Module):
    """One stream's way into an attention (q, k, v; normalized per head) and out of it."""

    def __init__(self, width: int, heads: int, qk_norm: bool, out: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if out else None

    def to_qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(tokens), "b n (three h k) -> three b h n k", three=3, h=self.heads)
        return self.norm_q(q), self.norm_k(k), v


def attend(q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None = None) -> Tensor:
    """Softmax attention, heads joined again: three (b, h, n, k) → (b, n, h · k). `angles` rotate q and k (RoPE)."""
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n k -> b n (h k)")


def attend_apart(q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None, n: int, repulsion: Repulsion,
                 groups: int) -> Tensor:
    """What the first n queries read once the samples of a group have pushed their logits apart: → (b, n, h · k)."""
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    logits = repulsion.scores(q[:, :, :n] @ k.mT * q.shape[-1] ** -0.5, groups)
    return rearrange(logits.softmax(dim=-1) @ v, "b h n k -> b n (h k)")


class JointAttention(nn.Module):
    """Two streams, one softmax (SD3 section 4; Eq. 1 of contextual repulsion: f̂_T, f̂_I = MM-Attn(f_T, f_I)).

    context (b, n, d) and image (b, m, d) → the same shapes; the context is None where `context_out` is False (the
    last block of SD3, whose context nobody reads).
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, context_out: bool = True):
        super().__init__()
        self.context = StreamProjections(width, heads, qk_norm, out=context_out)
        self.image = StreamProjections(width, heads, qk_norm)

    def forward(self, context: Tensor, image: Tensor, angles: Tensor | None = None,
                repulsion: Repulsion | None = None, groups: int = 1) -> tuple[Tensor | None, Tensor]:
        n = context.shape[1]
        streams = zip(self.context.to_qkv(context), self.image.to_qkv(image), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in streams)  # the context first, then the image
        joint = attend(q, k, v, angles)
        if repulsion is not None and repulsion.tokens == "scores":  # the paper's ablation, appendix D
            joint = torch.cat([attend_apart(q, k, v, angles, n, repulsion, groups), joint[:, n:]], dim=1)
        context = self.context.out(joint[:, :n]) if self.context.out else None
        image = self.image.out(joint[:, n:])
        if repulsion is not None:  # Eq. 2: the samples of a group push each other's contextual tokens away
            context, image = repulsion.streams("attention", context, image, groups)
        return context, image


class SelfAttention(StreamProjections):
    """The image attends to itself alone: (b, m, d) → (b, m, d), the second attention of SD3.5-medium."""

    def forward(self, image: Tensor) -> Tensor:
        return self.out(attend(*self.to_qkv(image)))
