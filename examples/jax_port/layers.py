"""What the networks share. Weights w are arrays by their names in the file. Ours: mmdit/layers.py."""

from collections.abc import Callable

import jax
from jax import Array

Weights = dict[str, Array]
Tap = Callable[[str, Array], Array]  # a named tensor → the one to go on with: itself, or the porting kit's


def linear(w: Weights, name: str, x: Array) -> Array:
    """(…, inputs) → (…, outputs); files hold (outputs, inputs)."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def normalize(x: Array, eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    return normalize(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]


def to_heads(w: Weights, names: list[str], h: int, x: Array) -> list[Array]:
    """Projections (b, n, d) → (b, h, n, k), one for each name."""
    return [linear(w, name, x).reshape(*x.shape[:2], h, -1).swapaxes(1, 2) for name in names]


def joined(x: Array) -> Array:
    """(b, h, n, k) → (b, n, h · k)."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(q: Array, k: Array, v: Array, scale: float | None = None, bias: Array | float = 0.0) -> Array:
    """softmax(scale · q kᵀ + bias) v: three (b, h, n, k) → the same."""
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5) + bias, axis=-1) @ v
