"""Write modules as checkpoints, in the layouts of the original releases and of the hub: all of it or nothing."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, MMDiTConfig, T5Encoder, TextDecoder

from . import configs
from .detect import AUTOENCODER, CLIP, DECODER, FLUX, FLUX2, SD3, T5, Kind, Part, PathLike
from .files import STEMS, TensorEntry
from .layouts import CheckpointError
from .load import open_part


def save_transformer(model: MMDiT, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an MMDiT as one file under its family's original names, or as a hub `transformer/` folder.

    "original": `path` ends in .safetensors; SD3's names carry their prefix. "hub": `path` is a folder that
    diffusers' `from_pretrained` reads; more than `max_shard_bytes` are split into shards. A checkpoint that is at
    `path` is replaced once everything is written. Raises CheckpointError (a ValueError) for a model that the
    layout cannot express, or a path that holds anything but a checkpoint.
    """
    _save(transformer_kind(model.config), model, path, layout, max_shard_bytes)


def transformer_kind(config: MMDiTConfig) -> Kind:
    """The family under whose names files store a transformer."""
    return FLUX2 if config.shared_modulation else FLUX if config.position == "rope" else SD3


def save_autoencoder(model: Autoencoder, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an autoencoder as one file or as a hub `vae/` folder; see `save_transformer`.

    "original": with SD3's prefix if its latents have SD3's scaling and shift, otherwise without a prefix, as FLUX.1's.
    The file does not store scaling and shift: if they are neither family's, load it with a config.
    """
    _save(AUTOENCODER, model, path, layout, max_shard_bytes)


def save_text_encoder(model: ClipTextEncoder | T5Encoder | TextDecoder, path: PathLike,
                      layout: Literal["original", "hub"] = "original", max_shard_bytes: int | None = None) -> None:
    """Store a text encoder as one file or as a hub `text_encoder/` folder; see `save_transformer`."""
    kind = {T5Encoder: T5, TextDecoder: DECODER}.get(type(model), CLIP)
    _save(kind, model, path, layout, max_shard_bytes)


def _save(kind: Kind, model: nn.Module, path: PathLike, layout: str, max_shard_bytes: int | None) -> None:
    path, config, hub = Path(path), model.config, layout == "hub"
    if layout not in ("original", "hub") or (max_shard_bytes is not None and (not hub or max_shard_bytes < 1)):
        raise CheckpointError(f'layout "original", or "hub" in shards from 1 byte, got {layout!r}, {max_shard_bytes}')
    if hub == (path.suffix == ".safetensors") or (path.exists() and hub != path.is_dir()):
        raise CheckpointError(f"{path}: give a folder for the hub layout, a name in .safetensors for the original one")
    usual = re.compile(r"config\.json|.*\.safetensors(\.index\.json)?")
    if foreign := [file.name for file in (path.iterdir() if path.is_dir() else ()) if not usual.fullmatch(file.name)]:
        raise CheckpointError(f"{path} holds more than a checkpoint ({foreign[0]}) and would be replaced: give another")
    names = kind.layouts[hub]
    if scaled := [name for name, _ in model.named_buffers() if name.endswith(".scale")]:
        raise CheckpointError(f"{scaled[0]} is not written: load float8 weights in bfloat16, without keep_float8")
    prefix = names.prefix if kind is not AUTOENCODER or config.scaling == configs.LATENTS["sd3"]["scaling"] else ""
    parts = {theirs: tensor.detach() for _, theirs, tensor in names.split(model.state_dict(), configs.sizes_of(config))}
    entries = {theirs: TensorEntry(path, theirs, "F32", tuple(tensor.shape)) for theirs, tensor in parts.items()}
    part = Part(kind, names, "", entries, path, configs.to_hub(config), ())
    again = {**vars(open_part(part, None if hub else config).config), **configs.fields(part)}
    again.pop("layers", None)  # of a decoder: which of its states are read, no file says
    if lost := [name for name, value in again.items() if value != getattr(config, name)]:
        raise CheckpointError(f"{path}: the {names.name} layout cannot store {lost[0]} {getattr(config, lost[0])!r}")
    tensors = {prefix + theirs: part.clone() if hub else part.contiguous() for theirs, part in parts.items()}
    if "bn.running_mean" in tensors:  # FLUX.2's own module has a third buffer, which has no effect
        tensors["bn.num_batches_tracked"] = torch.tensor(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        if hub:
            new.mkdir()
            stem = STEMS[kind in (CLIP, T5, DECODER)]
            save_torch_state_dict(tensors, new, filename_pattern=stem + "{suffix}.safetensors",
                                  max_shard_size=max_shard_bytes or 2**62)
            (new / "config.json").write_text(json.dumps(configs.to_hub(config), indent=2) + "\n", encoding="utf-8")
        else:
            save_file(tensors, new, metadata={"format": "pt"})
        if hub and path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
