"""A linear layer whose weights stay float8 in memory and are widened for as long as it runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Float8Linear(nn.Module):
    """What `nn.Linear` computes, (…, inputs) → (…, outputs), in the dtype of its input, from half the memory.

    weight (outputs, inputs) in float8 (e4m3fn or e5m2); scale, where there is one, () or (outputs, 1) float32, is
    multiplied in after widening, as in scaled float8 files.
    """

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, scaled: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.register_buffer("scale", torch.ones(outputs, 1) if scaled else None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.widened(x.dtype), self.bias)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights in `dtype`: the very numbers that widening them while loading gives."""
        return self.weight.to(dtype) if self.scale is None else (self.weight.float() * self.scale).to(dtype)
