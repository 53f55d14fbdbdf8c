"""Linear layers whose weights stay float8 in memory and are widened for as long as they run."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import Modulation


class Float8Linear(nn.Linear):
    """What `nn.Linear` computes, (…, inputs) → (…, outputs), in the dtype of its input, from half the memory.

    weight (outputs, inputs) in float8 (e4m3fn or e5m2); scale, where there is one, () or (outputs, 1) float32, is
    multiplied in after widening, as in scaled float8 files. Made on the meta device, to be filled.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, scaled: bool = False):
        super().__init__(inputs, outputs, bias, device="meta")
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scale", torch.ones(outputs, 1, device="meta") if scaled else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.widened(x.dtype), self.bias)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights in `dtype`: the very numbers that widening them while loading gives."""
        return self.weight.to(dtype) if self.scale is None else (self.weight.float() * self.scale).to(dtype)


class Float8Modulation(Modulation, Float8Linear):
    """What `Modulation` computes, with `Float8Linear` for the linear layer that it is."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, scaled: bool = False):
        Float8Linear.__init__(self, inputs, outputs, dtype, bias, scaled)
        self.parts = outputs // inputs
