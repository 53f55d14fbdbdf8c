"""The autoencoder's decoder: a latent → a picture. Ours: mmdit/autoencoder.py. Shapes are (b, channels, y, x)."""

import jax
from jax import Array

from .layers import Tap, Weights, attend, linear, normalize


def decode(w: Weights, config: dict, latent: Array, tap: Tap) -> Array:
    """(b, c, y, x) → (b, 3, Y, X), about [-1, 1], not clipped."""
    x, groups = tap("decoder.in", latent / config["scaling_factor"] + config["shift_factor"]), config["norm_num_groups"]
    x = residual(w, "decoder.mid_block.resnets.0", conv(w, "decoder.conv_in", x), groups)
    x = residual(w, "decoder.mid_block.resnets.1", attention(w, "decoder.mid_block.attentions.0", x, groups), groups)
    x = tap("decoder.middle.out", x)
    for level in range(len(config["block_out_channels"])):
        for i in range(config["layers_per_block"] + 1):
            x = residual(w, f"decoder.up_blocks.{level}.resnets.{i}", x, groups)
        up = f"decoder.up_blocks.{level}.upsamplers.0.conv"
        x = conv(w, up, x.repeat(2, axis=2).repeat(2, axis=3)) if f"{up}.weight" in w else x
        x = tap(f"decoder.levels.{level}.out", x)
    return tap("image", conv(w, "decoder.conv_out", jax.nn.silu(group_norm(w, "decoder.conv_norm_out", x, groups))))


def conv(w: Weights, name: str, x: Array) -> Array:
    """A convolution that keeps the size, 3 × 3 or 1 × 1."""
    return jax.lax.conv(x, w[f"{name}.weight"], (1, 1), "SAME") + w[f"{name}.bias"][:, None, None]


def group_norm(w: Weights, name: str, x: Array, groups: int) -> Array:
    y = normalize(x.reshape(len(x), groups, -1), 1e-6).reshape(x.shape)
    return y * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def residual(w: Weights, name: str, x: Array, groups: int) -> Array:
    y = conv(w, f"{name}.conv1", jax.nn.silu(group_norm(w, f"{name}.norm1", x, groups)))
    y = conv(w, f"{name}.conv2", jax.nn.silu(group_norm(w, f"{name}.norm2", y, groups)))
    return y + (conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)


def attention(w: Weights, name: str, x: Array, groups: int) -> Array:
    """One head over all places, added to its input."""
    tokens = group_norm(w, f"{name}.group_norm", x, groups).reshape(*x.shape[:2], -1).swapaxes(1, 2)[:, None]
    q, k, v = (linear(w, f"{name}.to_{part}", tokens) for part in "qkv")  # (b, 1, y · x, c)
    return x + linear(w, f"{name}.to_out.0", attend(q, k, v)[:, 0]).swapaxes(1, 2).reshape(x.shape)
