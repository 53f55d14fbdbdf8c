"""The small parts that blocks share: MLPs, timestep features, modulation; and a check of the text encoders."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """A gated activation: SiLU of the first half, times the second (FLUX.2): (…, 2 w) → (…, w)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class MLP(nn.Module):
    """Linear, activation, linear: (…, inputs) → (…, outputs). A gated activation halves what it reads."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: Callable[[Tensor], Tensor],
                 bias: bool = True):
        super().__init__()
        self.in_layer = nn.Linear(inputs, 2 * hidden if isinstance(activation, SwiGLU) else hidden, bias)
        self.activation = activation
        self.out_layer = nn.Linear(hidden, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.activation(self.in_layer(x)))


class GatedMLP(nn.Module):
    """out(activation(gate(x)) · value(x)) without biases (T5, Qwen3, Mistral): (…, d) → (…, d)."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.activation(self.gate(x)) * self.value(x))


def check_vocabulary(ids: Tensor, size: int, whose: str) -> None:
    """Raises ValueError for token ids outside [0, size)."""
    low, high = ids.min().item(), ids.max().item()
    if low < 0 or high >= size:
        raise ValueError(f"{whose} ids must lie in [0, {size - 1}], found {low if low < 0 else high}: use the "
                         "tokenizer of the same checkpoint")


def timestep_features(sigma: Tensor, width: int = 256) -> Tensor:
    """Sin/cos features of a number such as σ, counted in thousandths: (b,) → (b, width) float32, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device) / half)
    angles = 1000.0 * sigma.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Triple(NamedTuple):
    """The modulation of one residual branch (adaLN), each (b, 1, d); no gate where nothing is added to the stream."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


class Modulation(nn.Linear):
    """The conditioning vector (b, d) becomes `parts` vectors (b, 1, d): triples of shift, scale and gate (adaLN)."""

    def __init__(self, width: int, parts: int, bias: bool = True):
        super().__init__(width, parts * width, bias)
        self.parts = parts

    def forward(self, vector: Tensor) -> tuple[Triple, ...]:
        vectors = super().forward(F.silu(vector)).unsqueeze(1).chunk(self.parts, dim=-1)
        return tuple(Triple(*vectors[i : i + 3]) for i in range(0, self.parts, 3))


class SharedModulation(nn.Module):
    """Stands in for a block's `Modulation` where all blocks share theirs (FLUX.2).

    The model then gives each block, in place of the conditioning vector, what it computed once: the triples of
    "context", "image" and "single". This takes those of one of them.
    """

    def __init__(self, stream: str):
        super().__init__()
        self.stream = stream

    def forward(self, shared: dict[str, tuple[Triple, ...]]) -> tuple[Triple, ...]:
        return shared[self.stream]


def modulate(tokens: Tensor, by: Triple) -> Tensor:
    """LayerNorm without weights of its own; scale and shift come from the modulation."""
    return (1 + by.scale) * F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) + by.shift


def clip_float16(tokens: Tensor) -> Tensor:
    """A residual stream within float16's range, as the published implementations keep it; other dtypes unchanged."""
    return tokens.clamp(-65504, 65504) if tokens.dtype == torch.float16 else tokens
