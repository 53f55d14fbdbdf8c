"""The kinds of modules that checkpoints hold, and which of them a file holds: told by names alone."""

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
    """What loading and saving need to know of one kind of module."""

    name: str
    module: type[nn.Module]
    config: type
    original: Layout
    hub: Layout
    stem: str  # the hub's name of the weight file
    from_hub: Callable[[configs.Json], configs.Config]
    fields: Callable[[shapes.Shapes], dict]  # what the stored shapes settle
    rest: Callable[[shapes.Shapes, dict], dict]  # what else the public checkpoints have
    bare: Layout | None = None  # a second hub layout, for reading
    identity: str | None = None  # our tensor that is the identity where a config asks for it and the file has none

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

# The beginnings of the names of each module in files that hold several.
ROOTS = ("model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders.clip_l.", "text_encoders.clip_g.",
         "text_encoders.t5xxl.")

CLIP_WIDTHS = {768: "clip_l", 1280: "clip_g"}

# Names that only models of other kinds have, and what such a model is. The first that fits counts.
FOREIGN = [
    (r"lora|dora_|hada_w|lokr_w", "a LoRA, a small change to a model: give the model itself"),
    (r"^controlnet_|^input_hint_block|^control_model\.", "a ControlNet: give the model that it steers"),
    (r"\.absmax$|\.quant_map$|\.qweight$|\.bitsandbytes__", "quantized to 4 or 8 bits: give a float8 or wider release"),
    (r"^vision_model\.", "a whole CLIP, pictures included: give its text encoder"),
    (r"_stream_modulation", "FLUX.2, another family: give a FLUX.1 or SD3 checkpoint"),
    (r"distilled_guidance_layer", "Chroma, a FLUX.1 without modulation layers: give a FLUX.1 or SD3 checkpoint"),
    (r"(^|\.)label_emb\.|^add_embedding\.|^conditioner\.",
     "SDXL, whose network is no MMDiT: give a FLUX.1 or SD3 checkpoint"),
    (r"(^|\.)input_blocks\.0\.0\.weight|^down_blocks\.0\.resnets\.0\.",
     "Stable Diffusion 1 or 2, whose network is no MMDiT: give a FLUX.1 or SD3 checkpoint"),
]


class Recognized(NamedTuple):
    """One module in a file: its kind, in which layout, under which prefix, its entries under the layout's names."""

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
    """Every module of a kind we know."""
    found = [
        (kind, layout, prefix)
        for kind in KINDS for layout in kind.layouts for prefix in (*layout.prefixes, "")
        if prefix + layout.sign in entries
    ]
    bare = any(not prefix for *_, prefix in found)
    return [Recognized(kind, layout, prefix, _own(entries, layout, prefix, strangers=not (prefix and bare)))
            for kind, layout, prefix in found]


def _own(entries: Mapping[str, TensorEntry], layout: Layout, prefix: str, strangers: bool) -> dict[str, TensorEntry]:
    """What begins as this module's names do and, with `strangers`, what begins as no module's.

    These are the module's that has no prefix; in a file where all have one, each reports them with their full names.
    """
    roots = tuple(root for root in ROOTS if prefix.startswith(root))
    own = {name.removeprefix(prefix): entry for name, entry in entries.items()
           if name.startswith(roots) or strangers and not name.startswith(ROOTS)}
    for copy, name in layout.copies.items():
        if copy in own:
            own.setdefault(name, own.pop(copy))
    return {name: entry for name, entry in own.items() if not name.endswith(layout.ignored)}


def foreign(names: Iterable[str]) -> str | None:
    """What a checkpoint of another kind is, and what to do; None where nothing tells."""
    names = list(names)
    return next((what for pattern, what in FOREIGN if any(re.search(pattern, name) for name in names)), None)
