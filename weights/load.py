"""Load checkpoints into modules: recognize the layout, find the config, check every tensor, read. And save modules."""

import os
from pathlib import Path
from typing import Literal

import torch
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
from mmdit.float8 import Float8Linear

from . import configs, shapes
from .kinds import AUTOENCODER, CLIP_TEXT, FLUX, SD3, T5_TEXT, Kind
from .names import CheckpointError
from .stored import Role, Stored, find_stored
from .writing import write_file, write_folder

PathLike = str | os.PathLike


def load_transformer(path: PathLike, config: MMDiTConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu", keep_float8: bool = False) -> MMDiT:
    """An MMDiT from an original or merged file of FLUX.1 or SD3, from a `transformer/` folder, from the folder around
    it, or from a name on the hub (`hub.resolve`).

    Without `config` the sizes come from config.json or, for an original file, from its names and shapes; 64-wide
    heads are assumed where no q/k norm shows their width (SD3-medium), rotary axes (16, 56, 56) for 128-wide heads.
    A config must agree with the tensors. Parameters are read one by one, directly into `dtype` on `device`; `dtype`
    None keeps the stored dtype. `keep_float8` keeps float8 weights of the blocks in float8 and converts each layer's
    when it runs (always so with `dtype` None). The other modules of a merged file are ignored.
    Raises CheckpointError (a ValueError) for a file that does not fit, FileNotFoundError for a missing one.
    """
    return open_transformer(path, config).load(dtype, device, keep_float8)


def load_autoencoder(path: PathLike, config: AutoencoderConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu") -> Autoencoder:
    """An autoencoder from FLUX.1's ae.safetensors, an original SD3 file, a merged file, a `vae/` folder, or the folder
    around it.

    An original file does not hold the latents' scaling and shift: without `config` they are SD3's where it has SD3's
    prefix `first_stage_model.`, FLUX.1's otherwise, and norms have 32 groups. The rest is as in `load_transformer`.
    """
    return open_autoencoder(path, config).load(dtype, device)


def load_text_encoder(path: PathLike, config: ClipConfig | T5Config | None = None, dtype: torch.dtype | None = None,
                      device: str | torch.device = "cpu", keep_float8: bool = False,
                      which: Role | None = None) -> ClipTextEncoder | T5Encoder:
    """A CLIP or T5 text encoder, told apart by tensor names, from a file or a `text_encoder*/` folder.

    `which` chooses in a merged file that holds several. An original CLIP file does not hold everything: without
    `config` heads are 64 wide, the activation is quick_gelu at width 768 (CLIP-L) and gelu otherwise (CLIP-G), the
    end token is the vocabulary's last. A config with `projection_dim` for a file without projection (SD3's original
    clip_l) makes it the identity. The rest is as in `load_transformer`.
    """
    return open_text_encoder(path, config, which).load(dtype, device, keep_float8)


def open_transformer(path: PathLike, config: MMDiTConfig | None = None) -> Stored:
    """The transformer as its headers describe it: `.config`, and `.load(dtype, device, keep_float8)`."""
    return find_stored((FLUX, SD3), path, "transformer", config=config)


def open_autoencoder(path: PathLike, config: AutoencoderConfig | None = None,
                     family: Literal["flux", "sd3"] | None = None) -> Stored:
    """The autoencoder as its headers describe it; `family` sets scaling and shift for a file without config."""
    return find_stored((AUTOENCODER,), path, "vae", config=config, family=family)


def open_text_encoder(path: PathLike, config: ClipConfig | T5Config | None = None, which: Role | None = None) -> Stored:
    """The text encoder as its headers describe it."""
    if which not in (None, "clip_l", "clip_g", "t5"):
        raise CheckpointError(f"which must be clip_l, clip_g or t5, got {which!r}")
    return find_stored((CLIP_TEXT, T5_TEXT), path, which=which, config=config)


def save_transformer(model: MMDiT, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an MMDiT as one file under its family's original names, or as a hub `transformer/` folder.

    "original": `path` ends in .safetensors; SD3's names carry their prefix. "hub": `path` is a folder that
    diffusers' `from_pretrained` reads; more than `max_shard_bytes` are split into shards. A checkpoint that is at
    `path` is replaced once everything is written. Raises CheckpointError (a ValueError) for a model that the
    layout cannot express, or a path that holds anything but a checkpoint.
    """
    kind = FLUX if model.config.position == "rope" else SD3
    _save(kind, model, path, layout, max_shard_bytes, prefix=kind.original.prefix)


def save_autoencoder(model: Autoencoder, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an autoencoder as one file or as a hub `vae/` folder; see `save_transformer`.

    "original": with SD3's prefix if its latents have SD3's scaling and shift, otherwise without a prefix, as FLUX.1's.
    The file does not store scaling and shift: if they are neither family's, load it with a config.
    """
    latents = {"shift": model.config.shift, "scaling": model.config.scaling}
    prefix = AUTOENCODER.original.prefix if latents == shapes.LATENTS["sd3"] else ""
    _save(AUTOENCODER, model, path, layout, max_shard_bytes, prefix)


def save_text_encoder(model: ClipTextEncoder | T5Encoder, path: PathLike,
                      layout: Literal["original", "hub"] = "original", max_shard_bytes: int | None = None) -> None:
    """Store a text encoder as one file or as a hub `text_encoder/` folder; see `save_transformer`."""
    _save(T5_TEXT if isinstance(model, T5Encoder) else CLIP_TEXT, model, path, layout, max_shard_bytes)


def _save(kind: Kind, model: nn.Module, path: PathLike, layout: str, max_shard_bytes: int | None,
          prefix: str = "") -> None:
    if layout not in ("original", "hub"):
        raise CheckpointError(f'layout must be "original" or "hub", got {layout!r}')
    if layout == "original" and max_shard_bytes is not None:
        raise CheckpointError('max_shard_bytes is for layout "hub": an original file is never split')
    names = kind.hub if layout == "hub" else kind.original
    for key, value in names.needs.items():
        if getattr(model.config, key) != value:
            raise CheckpointError(f"the {names.name} layout requires {key} {value!r}, this model has "
                                  f"{getattr(model.config, key)!r}: it cannot be stored in it")
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear) and module.scale is not None:
            raise CheckpointError(f"{name} is float8 with a scale, which is not written: save the model that "
                                  "dtype=torch.bfloat16 without keep_float8 loads")
    parts = names.split(model.state_dict(), configs.sizes_of(model.config))
    if layout == "hub":
        tensors = {theirs: part for _, theirs, part in parts}
        write_folder(Path(path), tensors, configs.to_hub(model.config), kind.stem, max_shard_bytes)
    else:
        tensors = {prefix + theirs: part for _, theirs, part in parts}
        tensors |= {copy: tensors[name] for copy, name in names.copies.items()}
        write_file(Path(path), tensors)
