"""The small parts that every block shares: MLP, timestep features, modulation."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, activation, linear: (…, inputs) → (…, outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: nn.Module):
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden)
        self.activation = activation
        self.out_layer = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.activation(self.in_layer(x)))


def timestep_features(timestep: Tensor, width: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Sin/cos features of a timestep in [0, 1], counted in thousandths: (b,) → (b, width) float32, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timestep.device) / half)
    angles = 1000.0 * timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Modulation(nn.Linear):
    """The conditioning vector (b, d) becomes `parts` vectors (b, 1, d): shifts, scales and gates (adaLN)."""

    def __init__(self, width: int, parts: int):
        super().__init__(width, parts * width)
        self.parts = parts

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return rearrange(super().forward(F.silu(vector)), "b (parts d) -> parts b 1 d", parts=self.parts).unbind()


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own; scale and shift come from the modulation."""
    return (1 + scale) * F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) + shift
