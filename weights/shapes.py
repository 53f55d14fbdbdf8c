"""Sizes of a module from the names and shapes of its stored tensors, for files that come without a config.json.

For each kind of module: `*_fields`, the config values that the tensors determine (a given config must agree with them),
and `*_rest`, the other values, as in the public checkpoints.
"""

from collections.abc import Mapping
from itertools import count
from math import isqrt, prod
from typing import Any

from .files import TensorEntry
from .names import CheckpointError, Layout, Sizes

Fields = dict[str, Any]

# Shift and scaling of the latents, which an autoencoder's file does not store.
LATENTS = {"flux": {"shift": 0.1159, "scaling": 0.3611}, "sd3": {"shift": 0.0609, "scaling": 1.5305}}


class Shapes:
    """Shapes of stored tensors under our names; of several that are concatenated to ours, that of the first."""

    def __init__(self, entries: Mapping[str, TensorEntry], layout: Layout, prefix: str = ""):
        self.entries, self.layout, self.prefix = entries, layout, prefix

    def get(self, ours: str) -> tuple[int, ...] | None:
        try:
            entry = self.entries.get(self.layout.find(ours, Sizes())[0][0])
        except CheckpointError:  # the layout has no such tensor
            return None
        return entry.shape if entry else None

    def __contains__(self, ours: str) -> bool:
        return self.get(ours) is not None

    def __getitem__(self, ours: str) -> tuple[int, ...]:
        shape, stored = self.get(ours), self.layout.find(ours, Sizes())[0][0]
        if shape is None:
            raise CheckpointError(f"tensor {stored} is missing: give the whole file, or the folder of all shards")
        axes = 1 if ".norm" in ours else 2
        if len(shape) < axes or 0 in shape:
            raise CheckpointError(f"tensor {stored} has shape {shape}, expected at least {axes} axes and no empty one: "
                                  "download it again")
        return shape

    def count(self, ours: str) -> int:
        """The number of blocks, counted by a tensor that each has."""
        return next(i for i in count() if ours.format(i) not in self)


def transformer_fields(shapes: Shapes) -> Fields:
    width, *patch = shapes["image_in.weight"]  # c * p * p (FLUX, whose p is 2) or c, p, p (SD3)
    p = patch[-1] if len(patch) == 3 else 2
    blocks = shapes.count("dual_blocks.{}.attention.image.qkv.weight")
    found = {
        "hidden_size": width, "latent_channels": prod(patch) // p**2, "patch_size": p,
        "context_dim": shapes["context_in.weight"][1], "pooled_dim": shapes["pooled_in.in_layer.weight"][1],
        "num_dual_blocks": blocks, "num_single_blocks": shapes.count("single_blocks.{}.linear_in.weight"),
        "guidance_embedding": "guidance_in.in_layer.weight" in shapes,
        "qk_norm": "dual_blocks.0.attention.image.norm_q.weight" in shapes,
        "dual_attention_blocks": tuple(
            i for i in range(blocks) if f"dual_blocks.{i}.image_attention.qkv.weight" in shapes
        ),
        "position": "table" if "position_table" in shapes else "rope",
    }
    if found["position"] == "table":
        found["position_table_size"] = isqrt(shapes["position_table"][1])
    if found["qk_norm"]:
        found["num_heads"] = width // shapes["dual_blocks.0.attention.image.norm_q.weight"][0]
    return found


def transformer_rest(shapes: Shapes, found: Fields) -> Fields:
    width = found["hidden_size"]
    heads = max(found.get("num_heads", width // 64), 1)
    rest = {"num_heads": heads, "mlp_ratio": shapes["dual_blocks.0.image.mlp.in_layer.weight"][0] / width}
    if found["position"] == "rope" and width // heads != 128:
        raise CheckpointError(
            f"heads are {width // heads} wide, and the file does not say how rotary positions divide them (known "
            "only for 128: 16, 56, 56): give config=MMDiTConfig(..., rope_axes=...)"
        )
    return rest


def autoencoder_fields(shapes: Shapes) -> Fields:
    levels = shapes.count("encoder.levels.{}.blocks.0.conv_1.weight")
    return {
        "channels": tuple(shapes[f"encoder.levels.{level}.blocks.0.conv_1.weight"][0] for level in range(levels)),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "blocks_per_level": shapes.count("encoder.levels.0.blocks.{}.conv_1.weight"),
    }


def autoencoder_rest(shapes: Shapes, found: Fields) -> Fields:
    if shapes.layout.name.startswith("hub") or found["latent_channels"] != 16:
        raise CheckpointError(
            "the scaling and shift of these latents are not known without a config.json: "
            "give config=AutoencoderConfig(...)"
        )
    return LATENTS["sd3" if shapes.prefix == "first_stage_model." else "flux"]


def clip_fields(shapes: Shapes) -> Fields:
    vocab_size, width = shapes["token_embedding.weight"][:2]
    found = {
        "vocab_size": vocab_size, "hidden_size": width,
        "intermediate_size": shapes["layers.0.mlp.in_layer.weight"][0],
        "num_layers": shapes.count("layers.{}.attention.qkv.weight"),
        "max_positions": shapes["position_embedding.weight"][0],
    }
    if "projection.weight" in shapes:
        found["projection_dim"] = shapes["projection.weight"][0]
    return found


def clip_rest(shapes: Shapes, found: Fields) -> Fields:
    return {
        "num_heads": max(found["hidden_size"] // 64, 1),
        "activation": "quick_gelu" if found["hidden_size"] == 768 else "gelu",
        "end_token": found["vocab_size"] - 1,
    }


def t5_fields(shapes: Shapes) -> Fields:
    vocab_size, width = shapes["token_embedding.weight"][:2]
    buckets, heads = shapes["relative_bias.weight"][:2]
    return {
        "vocab_size": vocab_size, "hidden_size": width, "num_heads": heads, "relative_buckets": buckets,
        "head_dim": shapes["layers.0.attention.qkv.weight"][0] // heads,
        "intermediate_size": shapes["layers.0.mlp.gate.weight"][0],
        "num_layers": shapes.count("layers.{}.attention.qkv.weight"),
    }


def t5_rest(shapes: Shapes, found: Fields) -> Fields:
    return {}
