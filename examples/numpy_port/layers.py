"""What the networks share. Ours: mmdit/layers.py, and torch."""

import math
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class Network:
    w: dict[str, Array]  # the weights, by their names in the file
    config: dict  # the config.json beside it
    record: dict[str, Array] = field(default_factory=dict)  # intermediate tensors, by the porting kit's names

    def linear(self, name: str, x: Array) -> Array:
        """(…, inputs) → (…, outputs); the file holds (outputs, inputs), of a patch (outputs, c, p, p)."""
        weight = self.w[f"{name}.weight"]
        return x @ weight.reshape(len(weight), -1).T + self.w.get(f"{name}.bias", 0)

    def layer_norm(self, name: str, x: Array) -> Array:
        return normalize(x, 1e-5) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms_norm(self, name: str, x: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * self.w[f"{name}.weight"]

    def to_heads(self, names: list[str], heads: int, x: Array) -> list[Array]:
        """Projections (b, n, d) → (b, h, n, k), one for each name."""
        return [self.linear(name, x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for name in names]

    def note(self, prefix: str, tensors: dict[str, Array | None]) -> None:
        self.record.update({prefix + name: tensor for name, tensor in tensors.items() if tensor is not None})


def attend(q: Array, k: Array, v: Array, scale: float | None = None, bias: Array | float = 0) -> Array:
    """softmax(scale · q kᵀ + bias) v, heads joined again: three (b, h, n, k) → (b, n, h · k)."""
    logits = q @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5) + bias
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(len(q), q.shape[2], -1)


def normalize(x: Array, eps: float) -> Array:
    """To mean 0 and variance 1 over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def silu(x: Array, beta: float = 1) -> Array:
    """x · sigmoid(β x), so written that nothing overflows."""
    return 0.5 * x * (1 + np.tanh(0.5 * beta * x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
