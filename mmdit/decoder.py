"""Decoders as text encoders: states inside Qwen3 (FLUX.2-klein) or Mistral-Small (FLUX.2-dev) are the context.

Models: Qwen Team, "Qwen3 Technical Report", 2025; Mistral AI's Mistral-Small-3.2-24B. Both are the transformer of
H. Touvron et al., "LLaMA", 2023, with grouped-query attention.
Letters: b batch, n tokens, d width, h heads, k head width.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GatedMLP, check_vocabulary


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder and the layers that are read; the defaults are those of Qwen3-4B in FLUX.2-klein-4B.

    Qwen3-8B: `hidden_size=4096, intermediate_size=12288`. Mistral-Small in FLUX.2-dev: `vocab_size=131072,
    hidden_size=5120, intermediate_size=32768, layers=(10, 20, 30), qk_norm=False, norm_eps=1e-5, rope_theta=1e9`.
    Raises ValueError for layers that do not ascend from 1, key/value heads that do not divide the heads, or an odd head
    width.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_heads: int = 32
    num_kv_heads: int = 8  # each is shared by num_heads / num_kv_heads heads
    head_dim: int = 128
    layers: tuple[int, ...] = (9, 18, 27)  # the layers, counted from 1, whose outputs are the context
    qk_norm: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self):
        if not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"DecoderConfig.layers is {self.layers}: give ascending numbers, counted from 1")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"DecoderConfig.num_heads {self.num_heads} is not a multiple of num_kv_heads "
                             f"{self.num_kv_heads}: as many heads share each key and value")
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim {self.head_dim} is odd: rotary positions turn pairs of numbers")

    @property
    def context_dim(self) -> int:
        """Width of the context: of all layers that are read, side by side."""
        return len(self.layers) * self.hidden_size

    @property
    def num_layers(self) -> int:
        """The layers that are built: none behind the last one that is read."""
        return self.layers[-1]


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary positions, (b, n, d) -> (b, n, d); `visible` as in `visibility`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        inner, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, inner, bias=False)
        self.k = nn.Linear(config.hidden_size, shared, bias=False)
        self.v = nn.Linear(config.hidden_size, shared, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (rearrange(part(x), "b n (h k) -> b h n k", k=self.config.head_dim)
                   for part in (self.q, self.k, self.v))
        q, k = rotate_halves(self.norm_q(q), rotation), rotate_halves(self.norm_k(k), rotation)
        k, v = (repeat(part, "b h n k -> b (h group) n k", group=q.shape[1] // part.shape[1]) for part in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x.masked_fill(~visible.any(dim=-1, keepdim=True), 0)  # a token that sees none, whatever the kernel returns
        return self.out(rearrange(x, "b h n k -> b n (h k)"))


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer, (b, n, d) -> (b, n, d)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = DecoderAttention(config)
        self.norm_2 = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, F.silu)

    def forward(self, x: Tensor, rotation: Tensor, visible: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), rotation, visible)
        return x + self.mlp(self.norm_2(x))


class TextDecoder(nn.Module):
    """The first layers of a causal language model: token ids (b, n) -> context (b, n, layers · d).

    The context has the outputs of `config.layers` side by side, without a final norm. Later layers, the final norm and
    the head are not part of the module.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids (b, n), int64. `mask` (b, n) is True (or 1) for tokens, False for padding; None: no padding.

        Padding is not attended to, but has states too, which the image model reads: behind a prompt it attends to the
        whole prompt, before a prompt to nothing. Raises ValueError where ids or mask are not (b, n), or where ids fall
        outside the vocabulary.
        """
        self._check(ids, mask)
        x = self.token_embedding(ids)
        rotation = rotations(ids.shape[1], self.config.head_dim, self.config.rope_theta, x)
        visible = visibility(torch.ones_like(ids) if mask is None else mask.to(ids.device))
        states = []
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rotation, visible)
            if number in self.config.layers:
                states.append(x)
        return torch.cat(states, dim=-1)

    def _check(self, ids: Tensor, mask: Tensor | None) -> None:
        if ids.ndim != 2 or 0 in ids.shape or (mask is not None and mask.shape != ids.shape):
            raise ValueError("the decoder expects ids, and a mask if there is padding, of shape (batch, tokens), not "
                             f"{' and '.join(str(tuple(x.shape)) for x in (ids, mask) if x is not None)}")
        check_vocabulary(ids, self.config.vocab_size, "the decoder's")


def visibility(mask: Tensor) -> Tensor:
    """Which keys a query may attend to, (b, 1, query, key): those up to itself that are not padding (mask (b, n))."""
    causal = torch.ones(2 * mask.shape[1:], dtype=torch.bool, device=mask.device).tril()
    return causal & rearrange(mask.bool(), "b key -> b 1 1 key")


def rotations(length: int, width: int, theta: float, like: Tensor) -> Tensor:
    """The cosines and sines of the positions' angles, (2, n, k/2), on the device and in the dtype of `like`.

    Pair i of a head turns by position · theta^(-2i/k). The angles are float32, whatever the dtype.
    """
    frequencies = theta ** (-torch.arange(0, width, 2, device=like.device).float() / width)
    angles = torch.outer(torch.arange(length, device=like.device).float(), frequencies)
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def rotate_halves(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (i, i + k/2) of each head, (b, h, n, k); the MMDiT's positions rotate neighbours instead."""
    (cos, sin), (a, b) = rotation, x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
