"""The kinds of modules that checkpoints hold, and recognizing them in a file by tensor names alone."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from mmdit import (
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
)

from . import configs, shapes
from .files import TensorEntry
from .names import Layout
from .names_autoencoder import AUTOENCODER_HUB, AUTOENCODER_ORIGINAL
from .names_text import CLIP_BARE, CLIP_LAYOUT, T5_LAYOUT
from .names_transformer import FLUX_HUB, FLUX_ORIGINAL, SD3_HUB, SD3_ORIGINAL


class Kind(NamedTuple):
    """What loading and saving use of one kind of module."""

    name: str
    module: type[nn.Module]
    config: type
    original: Layout
    hub: Layout
    stem: str  # the hub's name of the weight file
    from_hub: Callable[[configs.Json], configs.Config]
    fields: Callable[[shapes.Shapes], dict]  # config values that the stored shapes determine
    rest: Callable[[shapes.Shapes, dict], dict]  # the other values, as in the public checkpoints
    bare: Layout | None = None  # a second hub layout, for reading
    identity: str | None = None  # our tensor that is the identity if the config has it and the file does not

    @property
    def layouts(self) -> list[Layout]:
        return list(dict.fromkeys(layout for layout in (self.original, self.hub, self.bare) if layout))


FLUX = Kind("FLUX.1 transformer", MMDiT, MMDiTConfig, FLUX_ORIGINAL, FLUX_HUB, "diffusion_pytorch_model",
            configs.transformer_from_hub, shapes.transformer_fields, shapes.transformer_rest)
SD3 = FLUX._replace(name="SD3 transformer", original=SD3_ORIGINAL, hub=SD3_HUB)
AUTOENCODER = Kind("autoencoder", Autoencoder, AutoencoderConfig, AUTOENCODER_ORIGINAL, AUTOENCODER_HUB,
                   "diffusion_pytorch_model", configs.autoencoder_from_hub, shapes.autoencoder_fields,
                   shapes.autoencoder_rest)
CLIP_TEXT = Kind("CLIP text encoder", ClipTextEncoder, ClipConfig, CLIP_LAYOUT, CLIP_LAYOUT, "model",
                 configs.clip_from_hub, shapes.clip_fields, shapes.clip_rest, bare=CLIP_BARE,
                 identity="projection.weight")
T5_TEXT = Kind("T5 encoder", T5Encoder, T5Config, T5_LAYOUT, T5_LAYOUT, "model", configs.t5_from_hub, shapes.t5_fields,
               shapes.t5_rest)
KINDS = (FLUX, SD3, AUTOENCODER, CLIP_TEXT, T5_TEXT)

# The prefixes of each module's names in merged files.
ROOTS = ("model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders.clip_l.", "text_encoders.clip_g.",
         "text_encoders.t5xxl.")

CLIP_WIDTHS = {768: "clip_l", 1280: "clip_g"}

# Patterns of names that only unsupported models have, and what such a model is. The first match counts.
FOREIGN = [
    (r"lora|dora_|hada_w|lokr_w", "a LoRA, a small change to a model: give the model itself"),
    (r"^controlnet_|^input_hint_block|^control_model\.", "a ControlNet: give the model that it controls"),
    (r"\.absmax$|\.quant_map$|\.qweight$|\.bitsandbytes__", "quantized to 4 or 8 bits: give a float8 or wider release"),
    (r"^vision_model\.", "a whole CLIP with its image encoder: give its text encoder"),
    (r"_stream_modulation", "FLUX.2, another family: give a FLUX.1 or SD3 checkpoint"),
    (r"distilled_guidance_layer", "Chroma, a FLUX.1 without modulation layers: give a FLUX.1 or SD3 checkpoint"),
    (r"(^|\.)label_emb\.|^add_embedding\.|^conditioner\.",
     "SDXL, whose network is no MMDiT: give a FLUX.1 or SD3 checkpoint"),
    (r"(^|\.)input_blocks\.0\.0\.weight|^down_blocks\.0\.resnets\.0\.",
     "Stable Diffusion 1 or 2, whose network is no MMDiT: give a FLUX.1 or SD3 checkpoint"),
]


class Recognized(NamedTuple):
    """One module in a file: its kind, layout and prefix, and its tensors' entries under the layout's names."""

    kind: Kind
    layout: Layout
    prefix: str
    entries: dict[str, TensorEntry]

    @property
    def role(self) -> str:
        """transformer, autoencoder, clip_l, clip_g, t5, or clip where neither prefix nor width tells which."""
        if self.kind is not CLIP_TEXT:
            return {AUTOENCODER: "autoencoder", T5_TEXT: "t5"}.get(self.kind, "transformer")
        width = (shapes.Shapes(self.entries, self.layout).get("token_embedding.weight") or (0,))[-1]
        named = (role for role in CLIP_WIDTHS.values() if role in self.prefix)
        return next(named, CLIP_WIDTHS.get(width, "clip"))


def recognize(entries: Mapping[str, TensorEntry]) -> list[Recognized]:
    """The modules of known kinds in a file."""
    found = [
        (kind, layout, prefix)
        for kind in KINDS for layout in kind.layouts for prefix in (*layout.prefixes, "")
        if prefix + layout.sign in entries
    ]
    bare = any(not prefix for *_, prefix in found)
    return [Recognized(kind, layout, prefix, _own(entries, layout, prefix, unprefixed=not (prefix and bare)))
            for kind, layout, prefix in found]


def _own(entries: Mapping[str, TensorEntry], layout: Layout, prefix: str, unprefixed: bool) -> dict[str, TensorEntry]:
    """The entries under this module's prefix and, with `unprefixed`, those under no known prefix.

    The latter belong to the module without a prefix. In a file where every module has one they belong to none: each
    module reports them as unknown, under their full names.
    """
    roots = tuple(root for root in ROOTS if prefix.startswith(root))
    own = {name.removeprefix(prefix): entry for name, entry in entries.items()
           if name.startswith(roots) or unprefixed and not name.startswith(ROOTS)}
    for copy, name in layout.copies.items():
        if copy in own:
            own.setdefault(name, own.pop(copy))
    return {name: entry for name, entry in own.items() if not name.endswith(layout.ignored)}


def foreign(names: Iterable[str]) -> str | None:
    """What an unsupported checkpoint is, and what to do; None if no pattern matches."""
    names = list(names)
    return next((what for pattern, what in FOREIGN if any(re.search(pattern, name) for name in names)), None)
