"""The T5 encoder: a bidirectional transformer whose last states are the context of SD3 and FLUX.

Model: C. Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020,
in its version 1.1 (gated MLP). Letters: b batch, n tokens, d width, h heads, k head width.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GatedMLP, check_vocabulary


@dataclass(frozen=True)
class T5Config:
    """The sizes of a T5 encoder; the defaults are T5-XXL's (4.8 billion parameters).

    Attention is `num_heads * head_dim` wide, which may differ from `hidden_size`. Raises ValueError where the number of
    relative buckets is not a multiple of 4, or the maximal distance lies within the exact buckets.
    """

    vocab_size: int = 32128
    hidden_size: int = 4096
    head_dim: int = 64
    intermediate_size: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_buckets: int = 32
    relative_max_distance: int = 128

    def __post_init__(self):
        if self.relative_buckets % 4:
            raise ValueError(
                f"T5Config.relative_buckets is {self.relative_buckets}: use a multiple of 4 "
                "(two directions, half of each exact and half logarithmic)"
            )
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise ValueError(
                f"T5Config.relative_max_distance {self.relative_max_distance} must exceed the "
                f"{self.relative_buckets // 4} exact buckets of a direction"
            )


class T5Attention(nn.Module):
    """Self-attention of every token with every other, (b, n, d) and bias (1, h, n, n) -> (b, n, d)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        # T5 does not divide by sqrt(k): its initialization includes that factor.
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.out(rearrange(x, "b h n k -> b n (h k)"))


class T5Layer(nn.Module):
    """A pre-norm transformer layer, (b, n, d) -> (b, n, d)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = T5Attention(config)
        self.norm_2 = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, partial(F.gelu, approximate="tanh"))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), bias)
        return x + self.mlp(self.norm_2(x))


class T5Encoder(nn.Module):
    """T5's encoder: token ids (b, n) -> context (b, n, d).

    Padding is not masked: the image models were trained on the states of all n tokens.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.relative_bias = nn.Embedding(config.relative_buckets, config.num_heads)
        self.layers = nn.ModuleList(T5Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids (b, n), int64, into the last states after the final norm (b, n, d).

        Raises ValueError where ids are not (b, n) or fall outside the vocabulary, or where the parameters are
        float16, whose range T5's residual stream exceeds.
        """
        self._check(ids)
        x = self.token_embedding(ids)
        bias = self.position_bias(ids.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)

    def position_bias(self, length: int) -> Tensor:
        """The bias that every layer adds to its attention scores, (1, h, n, n); it depends on key - query alone."""
        position = torch.arange(length, device=self.relative_bias.weight.device)
        distance = rearrange(position, "key -> 1 key") - rearrange(position, "query -> query 1")
        bucket = relative_bucket(distance, self.config.relative_buckets, self.config.relative_max_distance)
        return rearrange(self.relative_bias(bucket), "query key h -> 1 h query key")

    def _check(self, ids: Tensor) -> None:
        if self.token_embedding.weight.dtype == torch.float16:
            raise ValueError("T5's parameters are float16, in which it overflows: use bfloat16 or float32")
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"T5 expects ids of shape (batch, tokens), not {tuple(ids.shape)}")
        check_vocabulary(ids, self.config.vocab_size, "T5")


def relative_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket, in [0, buckets), of a signed distance key - query (any shape, int64).

    The first half of the buckets is for keys up to the query, the second for keys after it. Within a half, the first
    half again holds one distance each; the rest grow logarithmically, and the last takes `max_distance` and beyond.
    Follows T5 (Raffel et al., 2020, section 2.1).
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    # In float32, as T5 was trained: the rounding decides at the edge of a bucket.
    growth = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(far < exact, far, logarithmic) + half * (distance > 0)
