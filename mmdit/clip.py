"""The CLIP text encoder: a causal transformer whose states and pooled vector condition SD3 and FLUX.

Model: A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021 (CLIP-L),
and OpenCLIP's bigG (CLIP-G). Letters: b batch, n tokens, d width, h heads, k head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import MLP, check_vocabulary


@dataclass(frozen=True)
class ClipConfig:
    """The sizes of a CLIP text encoder; the defaults are CLIP-L's.

    CLIP-G: `hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, activation="gelu",
    projection_dim=1280`. Raises ValueError for an unknown activation, or heads that do not divide the width.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: str = "quick_gelu"  # or "gelu", the exact one
    projection_dim: int | None = None  # None: the pooled state is not projected
    max_positions: int = 77
    end_token: int = 49407

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"ClipConfig.activation is {self.activation!r}: use one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"ClipConfig.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                "every head takes an equal share of the width"
            )
        if not 0 <= self.end_token < self.vocab_size:
            raise ValueError(f"ClipConfig.end_token {self.end_token} is not below vocab_size {self.vocab_size}")


class ClipOutput(NamedTuple):
    """The outputs of CLIP that condition the image model."""

    last: Tensor  # (b, n, d): the last layer's states, after the final norm
    penultimate: Tensor  # (b, n, d): the states that enter the last layer, no final norm
    unprojected: Tensor  # (b, d): `last` at the first end token
    pooled: Tensor  # (b, projection_dim or d): `unprojected` after CLIP's projection, if it has one


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipAttention(nn.Module):
    """Causal self-attention, (b, n, d) -> (b, n, d): a token attends to itself and to earlier tokens."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(x, "b h n k -> b n (h k)"))


class ClipLayer(nn.Module):
    """A pre-norm transformer layer, (b, n, d) -> (b, n, d)."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attention = ClipAttention(config.hidden_size, config.num_heads)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_size, ACTIVATIONS[config.activation])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class ClipTextEncoder(nn.Module):
    """CLIP's text encoder: token ids -> `ClipOutput`.

    SD3 takes `penultimate` and `pooled` of CLIP-L and CLIP-G, FLUX takes `unprojected` of CLIP-L alone.
    """

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, eps=1e-5)
        if config.projection_dim is not None:
            self.projection = nn.Linear(width, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> ClipOutput:
        """Encode token ids (b, n), int64, each row holding at least one end token.

        Raises ValueError where ids are not (b, n), are longer than `max_positions`, fall outside the vocabulary,
        or where a row has no end token.
        """
        self._check(ids)
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        penultimate = x
        for layer in self.layers:
            penultimate, x = x, layer(x)
        last = self.final_norm(x)

        # CLIP-L pads with the end token too, so the first of them ends the text.
        first_end = (ids == self.config.end_token).int().argmax(dim=1)
        unprojected = last[torch.arange(len(ids), device=ids.device), first_end]
        pooled = unprojected if self.config.projection_dim is None else self.projection(unprojected)
        return ClipOutput(last, penultimate, unprojected, pooled)

    def _check(self, ids: Tensor) -> None:
        config = self.config
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"CLIP expects ids of shape (batch, tokens), not {tuple(ids.shape)}")
        if ids.shape[1] > config.max_positions:
            raise ValueError(
                f"CLIP got {ids.shape[1]} tokens a prompt but has {config.max_positions} positions: "
                f"tokenize with length={config.max_positions}"
            )
        check_vocabulary(ids, config.vocab_size, "CLIP")
        without_end = (ids != config.end_token).all(dim=1).nonzero().flatten().tolist()
        if without_end:
            raise ValueError(
                f"CLIP ids in row {without_end[0]} hold no end token ({config.end_token}), where the state is pooled: "
                "end each prompt with it"
            )
