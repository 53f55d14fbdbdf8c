"""Linear layers that keep their weights in float8 and convert them to a wider dtype for each call."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Modulation


class Float8Linear(nn.Linear):
    """`nn.Linear` with float8 weights, (…, inputs) → (…, outputs), computed in the dtype of its input.

    weight (outputs, inputs) in float8 (e4m3fn or e5m2); a scale, (outputs, 1) float32, is multiplied in after
    the conversion, as in scaled float8 files. Created on the meta device, to be filled.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, scaled: bool = False):
        super().__init__(inputs, outputs, bias, device="meta")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scale", torch.ones(outputs, 1, device="meta") if scaled else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.widened(x.dtype), self.bias)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights in `dtype`, equal to those of a model that is loaded in `dtype`."""
        return self.weight.to(dtype) if self.scale is None else (self.weight.float() * self.scale).to(dtype)


class Float8Modulation(Modulation, Float8Linear):
    """`Modulation` with float8 weights."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, scaled: bool = False):
        Float8Linear.__init__(self, inputs, outputs, dtype, bias, scaled)
        self.parts = outputs // inputs


def may_stay_float8(name: str, layer: nn.Module) -> bool:
    """Whether the weights of a network's module `name` may stay in float8: those of linear layers inside blocks. The
    others are few, and the model computes in their dtype."""
    return isinstance(layer, nn.Linear) and ("blocks." in name or "layers." in name)


def keep_in_float8(layer: nn.Linear, dtype: torch.dtype, scaled: bool) -> Float8Linear:
    """A layer of the same sizes, on the meta device, for weights that stay in the float8 `dtype`."""
    kind = Float8Modulation if isinstance(layer, Modulation) else Float8Linear
    return kind(layer.in_features, layer.out_features, dtype, layer.bias is not None, scaled)
