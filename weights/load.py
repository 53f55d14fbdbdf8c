"""Checkpoints <-> modules: recognize the layout, settle the config, check every tensor, fill; and the way back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

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

from . import configs, fill, shapes
from .files import DTYPES
from .kinds import AUTOENCODER, CLIP_TEXT, FLUX, SD3, T5_TEXT, Kind, Part, find_parts, foreign
from .locate import Checkpoint, open_checkpoint
from .names import CheckpointError
from .writing import write_file, write_folder

PathLike = str | os.PathLike
Role = Literal["clip_l", "clip_g", "t5"]


def load_transformer(path: PathLike, config: MMDiTConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu", keep_float8: bool = False) -> MMDiT:
    """An MMDiT from an original or merged file of FLUX.1 or SD3, from a `transformer/` folder, from the folder around
    it, or from a name on the hub (`hub.resolve`).

    Without `config` the sizes come from config.json or, for an original file, from its names and shapes; 64-wide
    heads are assumed where no q/k norm shows their width (SD3-medium), rotary axes (16, 56, 56) for 128-wide heads.
    A config must agree with the tensors. Parameters are read one by one, straight into `dtype` on `device`; `dtype`
    None keeps what is stored. `keep_float8`: matrices of the blocks that are stored in float8 stay so and are widened
    layer by layer as they are used (always with `dtype` None). The other modules of a merged file are passed over.
    Raises CheckpointError (a ValueError) for what does not fit, FileNotFoundError for a missing file.
    """
    return _load((FLUX, SD3), path, "transformer", None, config, dtype, device, keep_float8)


def load_autoencoder(path: PathLike, config: AutoencoderConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu") -> Autoencoder:
    """An autoencoder from FLUX.1's ae.safetensors, an original SD3 file, a merged file, a `vae/` folder, or the folder
    around it.

    An original file does not hold the latents' scaling and shift: without `config` they are SD3's where it has SD3's
    prefix `first_stage_model.`, FLUX.1's otherwise, and norms have 32 groups. The rest is as in `load_transformer`.
    """
    return _load((AUTOENCODER,), path, "vae", None, config, dtype, device)


def load_text_encoder(path: PathLike, config: ClipConfig | T5Config | None = None, dtype: torch.dtype | None = None,
                      device: str | torch.device = "cpu", keep_float8: bool = False,
                      which: Role | None = None) -> ClipTextEncoder | T5Encoder:
    """A CLIP or T5 text encoder, whichever the names say, from a file or from a `text_encoder*/` folder.

    `which` chooses in a merged file that holds several. An original CLIP file does not hold everything: without
    `config` heads are 64 wide, the activation is quick_gelu at width 768 (CLIP-L) and gelu otherwise (CLIP-G), the
    end token is the vocabulary's last. A config with `projection_dim` for a file without projection (SD3's original
    clip_l) makes it the identity. The rest is as in `load_transformer`.
    """
    if which not in (None, "clip_l", "clip_g", "t5"):
        raise CheckpointError(f"which must be clip_l, clip_g or t5, got {which!r}")
    return _load((CLIP_TEXT, T5_TEXT), path, None, which, config, dtype, device, keep_float8)


def save_transformer(model: MMDiT, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an MMDiT as one file under its family's original names, or as a hub `transformer/` folder.

    "original": `path` ends in .safetensors; SD3's names carry their prefix. "hub": `path` is a folder that
    diffusers' `from_pretrained` reads; more than `max_shard_bytes` are split into shards. What was at `path` is
    replaced as a whole, once everything is written. Raises CheckpointError (a ValueError) for a model that the
    layout cannot express, or a path that holds anything but a checkpoint.
    """
    kind = FLUX if model.config.position == "rope" else SD3
    _save(kind, model, path, layout, max_shard_bytes, prefix=kind.original.prefix)


def save_autoencoder(model: Autoencoder, path: PathLike, layout: Literal["original", "hub"] = "original",
                     max_shard_bytes: int | None = None) -> None:
    """Store an autoencoder as one file or as a hub `vae/` folder; see `save_transformer`.

    "original": under SD3's prefix if its latents are scaled as SD3's, without a prefix, as FLUX.1's, otherwise. The
    file does not say how they are scaled: for neither family's numbers, load it with a config.
    """
    latents = {"shift": model.config.shift, "scaling": model.config.scaling}
    prefix = AUTOENCODER.original.prefix if latents == shapes.SD3_LATENTS else ""
    _save(AUTOENCODER, model, path, layout, max_shard_bytes, prefix)


def save_text_encoder(model: ClipTextEncoder | T5Encoder, path: PathLike,
                      layout: Literal["original", "hub"] = "original", max_shard_bytes: int | None = None) -> None:
    """Store a text encoder as one file or as a hub `text_encoder/` folder; see `save_transformer`."""
    _save(T5_TEXT if isinstance(model, T5Encoder) else CLIP_TEXT, model, path, layout, max_shard_bytes)


def _load(kinds: tuple[Kind, ...], path: PathLike, component: str | None, which: Role | None,
          config: configs.Config | None, dtype: torch.dtype | None, device: str | torch.device,
          keep_float8: bool = False) -> nn.Module:
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise CheckpointError(f"dtype must be one to compute in, such as torch.bfloat16, got {dtype}: float8 matrices "
                              "are kept by keep_float8=True")
    checkpoint = open_checkpoint(path, component, lambda entries: bool(_of_kinds(find_parts(entries), kinds, which)))
    part = _choose(checkpoint, kinds, which)
    given = config is not None
    config = _settle_config(part, checkpoint, config)
    sizes = configs.sizes_of(config)
    with torch.device("meta"):  # names and shapes, no numbers
        model = part.kind.module(config)
    ours, identity = model.state_dict(), part.kind.identity
    absent = identity in ours and not part.entries.keys() & part.layout.find(identity, sizes)[0]
    if given and absent:
        rows, columns = ours.pop(identity).shape
        if rows != columns:
            raise CheckpointError(f"{checkpoint.path} has no projection, and one of shape {(rows, columns)} cannot be "
                                  "the identity: give the file that has it, or a config without")
        model.set_submodule(identity.removesuffix(".weight"), nn.Identity())
    _compare(checkpoint, part, {theirs: piece for _, theirs, piece in part.layout.split(ours, sizes)})
    if keep_float8 or dtype is None:
        fill.keep_float8(model, part.layout, sizes, part.entries)
    fill.fill(model, part.layout, sizes, part.entries, dtype, device)
    if given and absent:
        like = next(model.parameters())
        projection = nn.Linear(rows, rows, bias=False, dtype=like.dtype, device=like.device)
        projection.weight.data.copy_(torch.eye(rows))
        model.set_submodule(identity.removesuffix(".weight"), projection)
    return model


def _of_kinds(parts: list[Part], kinds: tuple[Kind, ...], which: Role | None) -> list[Part]:
    """The parts of these kinds, and of this role as far as it shows."""
    roles = (None, which, *(("clip",) if which in ("clip_l", "clip_g") else ()))
    return [part for part in parts if part.kind in kinds and (which is None or part.role in roles)]


def _choose(checkpoint: Checkpoint, kinds: tuple[Kind, ...], which: Role | None) -> Part:
    """The one module that is meant."""
    parts = find_parts(checkpoint.entries)
    found = _of_kinds(parts, kinds, which)
    if len(found) == 1:
        return found[0]
    wanted = which or " or ".join(dict.fromkeys(kind.name for kind in kinds))
    if found:
        raise CheckpointError(f"{checkpoint.path} holds several of these: {', '.join(part.role for part in found)}: "
                              f"say which={found[0].role!r}, for example")
    if what := foreign(checkpoint.entries):
        raise CheckpointError(f"{checkpoint.path} is {what}")
    if parts:
        held = " and ".join(f"{part.kind.name} ({part.layout.name} layout)" for part in parts)
        raise CheckpointError(f"{checkpoint.path} holds no {wanted} but {held}: give another file")
    signs = " or ".join(dict.fromkeys(layout.sign for kind in kinds for layout in kind.layouts))
    first = next(iter(checkpoint.entries), "no tensor at all")
    raise CheckpointError(f"{checkpoint.path}: unknown layout; expected a tensor {signs}, found {first}: is it another "
                          "part of the model, or one of several shards?")


def _settle_config(part: Part, checkpoint: Checkpoint, config: configs.Config | None) -> configs.Config:
    """The caller's config, config.json's, or the one the shapes tell, in this order; the shapes must agree."""
    kind, stored = part.kind, shapes.Shapes(part.entries, part.layout, part.prefix)
    try:
        if config is not None and not isinstance(config, kind.config):
            raise CheckpointError(f"config is a {type(config).__name__}, expected a {kind.config.__name__}")
        found = kind.fields(stored)
        if config is None and checkpoint.config is not None and part.layout in (kind.hub, kind.bare):
            config = kind.from_hub(checkpoint.config)
        if config is None:
            return kind.config(**kind.rest(stored, found) | found)
        for name, value in found.items():
            if getattr(config, name) != value:
                raise CheckpointError(f"the config says {name} {getattr(config, name)!r}, the tensors say {value!r}: "
                                      "give the config that belongs to these weights")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return config


def _compare(checkpoint: Checkpoint, part: Part, wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is there, in its shape, and no other."""
    where, entries = f"{checkpoint.path} ({part.layout.name} layout)", part.entries
    if missing := [name for name in wanted if name not in entries]:
        raise CheckpointError(f"{where} lacks {len(missing)} of {len(wanted)} tensors, first {part.prefix}{missing[0]} "
                              f"of shape {tuple(wanted[missing[0]].shape)}: is it one of several shards, or cut short?")
    if unknown := [entry.name for name, entry in entries.items() if name not in wanted]:
        raise CheckpointError(f"{where} has {len(unknown)} tensors the model has no place for, first {unknown[0]}: "
                              "is it a variant of the model (LoRA, quantized, more inputs)?")
    for name, tensor in wanted.items():
        entry = entries[name]
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(f"{entry.file}: tensor {entry.name} has shape {entry.shape}, expected "
                                  f"{tuple(tensor.shape)}: give the config or file that belongs to it")
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{entry.file}: tensor {entry.name} is stored as {entry.dtype}, expected one of "
                                  f"{', '.join(DTYPES)}: use another release of the model")


def _save(kind: Kind, model: nn.Module, path: PathLike, layout: str, max_shard_bytes: int | None,
          prefix: str = "") -> None:
    if layout not in ("original", "hub"):
        raise CheckpointError(f'layout must be "original" or "hub", got {layout!r}')
    if layout == "original" and max_shard_bytes is not None:
        raise CheckpointError('max_shard_bytes is for layout "hub": an original file is never split')
    names = kind.hub if layout == "hub" else kind.original
    for key, value in names.needs.items():
        if getattr(model.config, key) != value:
            raise CheckpointError(f"the {names.name} layout takes {key} {value!r} for granted, this model has "
                                  f"{getattr(model.config, key)!r}: it cannot be stored so")
    parts = names.split(model.state_dict(), configs.sizes_of(model.config))
    if layout == "hub":
        tensors = {theirs: part for _, theirs, part in parts}
        write_folder(Path(path), tensors, configs.to_hub(model.config), kind.stem, max_shard_bytes)
    else:
        tensors = {prefix + theirs: part for _, theirs, part in parts}
        tensors |= {copy: tensors[name] for copy, name in names.copies.items()}
        write_file(Path(path), tensors)
