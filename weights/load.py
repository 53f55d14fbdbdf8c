"""Checkpoints <-> modules: recognize the layout, settle the config, check every tensor, fill; and the way back."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

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

from . import configs, shapes
from .files import Checkpoint, Entry, open_checkpoint, write_file, write_folder
from .names import CheckpointError, Layout
from .names_autoencoder import AUTOENCODER_HUB, AUTOENCODER_ORIGINAL
from .names_text import CLIP, CLIP_BARE, T5
from .names_transformer import FLUX_HUB, FLUX_ORIGINAL, SD3_HUB, SD3_ORIGINAL

PathLike = str | os.PathLike


class Kind(NamedTuple):
    """What loading and saving need to know of one kind of module."""

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
        return [layout for layout in (self.original, self.hub, self.bare) if layout]


FLUX = Kind(MMDiT, MMDiTConfig, FLUX_ORIGINAL, FLUX_HUB, "diffusion_pytorch_model",
            configs.transformer_from_hub, shapes.transformer_fields, shapes.transformer_rest)
SD3 = FLUX._replace(original=SD3_ORIGINAL, hub=SD3_HUB)
AUTOENCODER = Kind(Autoencoder, AutoencoderConfig, AUTOENCODER_ORIGINAL, AUTOENCODER_HUB, "diffusion_pytorch_model",
                   configs.autoencoder_from_hub, shapes.autoencoder_fields, shapes.autoencoder_rest)
CLIP_TEXT = Kind(ClipTextEncoder, ClipConfig, CLIP, CLIP, "model", configs.clip_from_hub, shapes.clip_fields,
                 shapes.clip_rest, bare=CLIP_BARE, identity="projection.weight")
T5_TEXT = Kind(T5Encoder, T5Config, T5, T5, "model", configs.t5_from_hub, shapes.t5_fields, shapes.t5_rest)


def load_transformer(path: PathLike, config: MMDiTConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu") -> MMDiT:
    """An MMDiT from an original file of FLUX.1 or SD3, from a `transformer/` folder, or from the folder around it.

    Without `config` the sizes come from config.json or, for an original file, from its names and shapes; 64-wide
    heads are assumed where no q/k norm shows their width (SD3-medium), rotary axes (16, 56, 56) for 128-wide heads.
    A config must agree with the tensors. `dtype` None keeps what is stored; on the CPU such tensors stay views of the
    file and are read when first used. An original SD3 file's autoencoder is passed over. Raises CheckpointError (a
    ValueError) for what does not fit, FileNotFoundError for a missing file.
    """
    return _load((FLUX, SD3), path, "transformer", config, dtype, device)


def load_autoencoder(path: PathLike, config: AutoencoderConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu") -> Autoencoder:
    """An autoencoder from FLUX.1's ae.safetensors, an original SD3 file, a `vae/` folder, or the folder around it.

    An original file does not hold the latents' scaling and shift: without `config` they are SD3's where it has SD3's
    prefix `first_stage_model.`, FLUX.1's where it has none, and norms have 32 groups. The rest is as in
    `load_transformer`.
    """
    return _load((AUTOENCODER,), path, "vae", config, dtype, device)


def load_text_encoder(path: PathLike, config: ClipConfig | T5Config | None = None, dtype: torch.dtype | None = None,
                      device: str | torch.device = "cpu") -> ClipTextEncoder | T5Encoder:
    """A CLIP or T5 text encoder, whichever the names say, from a file or from a `text_encoder*/` folder.

    An original CLIP file does not hold everything: without `config` heads are 64 wide, the activation is quick_gelu
    at width 768 (CLIP-L) and gelu otherwise (CLIP-G), the end token is the vocabulary's last. A config with
    `projection_dim` for a file without projection (SD3's original clip_l) makes it the identity. The rest is as in
    `load_transformer`.
    """
    return _load((CLIP_TEXT, T5_TEXT), path, None, config, dtype, device)


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


def _load(kinds: tuple[Kind, ...], path: PathLike, component: str | None, config: configs.Config | None,
          dtype: torch.dtype | None, device: str | torch.device) -> nn.Module:
    checkpoint = open_checkpoint(path, component)
    kind, layout, prefix, entries = _recognize(checkpoint, kinds)
    given = config is not None
    config = _settle_config(kind, layout, checkpoint, shapes.Shapes(entries, layout, bool(prefix)), config)
    sizes = configs.sizes_of(config)
    with torch.device("meta"):  # names and shapes, no numbers
        model = kind.module(config)
    ours = model.state_dict()
    absent = kind.identity in ours and not entries.keys() & layout.find(kind.identity, sizes)[0]
    identity = ours.pop(kind.identity).shape if given and absent else None
    _compare(checkpoint, layout, prefix, entries, {theirs: part for _, theirs, part in layout.split(ours, sizes)})
    state = {
        name: layout.join(name, sizes, lambda theirs: checkpoint.read(entries[theirs], dtype, device)) for name in ours
    }
    if identity:
        if identity[0] != identity[1]:
            raise CheckpointError(f"{checkpoint.path} has no projection, and one of shape {tuple(identity)} cannot be "
                                  "the identity: give the file that has it, or a config without")
        state[kind.identity] = torch.eye(identity[0]).to(next(iter(state.values())))
    model.load_state_dict(state, assign=True)
    return model


def _recognize(checkpoint: Checkpoint, kinds: tuple[Kind, ...]) -> tuple[Kind, Layout, str, dict[str, Entry]]:
    """The kind, layout, prefix, and the component's entries under the layout's own names."""
    names = checkpoint.entries
    for kind in kinds:
        for layout in kind.layouts:
            for prefix in (layout.prefix, ""):
                if prefix + layout.sign not in names:
                    continue
                entries = {n.removeprefix(prefix): e for n, e in names.items() if not n.startswith(layout.others)}
                for copy, name in layout.copies.items():
                    if copy in entries:
                        entries.setdefault(name, entries.pop(copy))
                for name in layout.ignored:
                    entries.pop(name, None)
                return kind, layout, prefix, entries
    signs = " or ".join(dict.fromkeys(layout.prefix + layout.sign for kind in kinds for layout in kind.layouts))
    found = next(iter(names), "no tensor at all")
    raise CheckpointError(f"{checkpoint.path}: unknown layout; expected a tensor {signs}, found {found}: "
                          "is it another part of the model?")


def _settle_config(kind: Kind, layout: Layout, checkpoint: Checkpoint, stored: shapes.Shapes,
                   config: configs.Config | None) -> configs.Config:
    """The caller's config, config.json's, or the one the shapes tell, in this order; the shapes must agree."""
    try:
        if config is not None and not isinstance(config, kind.config):
            raise CheckpointError(f"config is a {type(config).__name__}, expected a {kind.config.__name__}")
        found = kind.fields(stored)
        if config is None and checkpoint.config is not None and layout in (kind.hub, kind.bare):
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


def _compare(checkpoint: Checkpoint, layout: Layout, prefix: str, entries: Mapping[str, Entry],
             wanted: Mapping[str, Tensor]) -> None:
    """Every wanted tensor is there, in its shape, and no other."""
    where = f"{checkpoint.path} ({layout.name} layout)"
    if missing := [name for name in wanted if name not in entries]:
        raise CheckpointError(f"{where} lacks {len(missing)} of {len(wanted)} tensors, first {prefix}{missing[0]} of "
                              f"shape {tuple(wanted[missing[0]].shape)}: is it one of several shards, or cut short?")
    if unknown := [entry.name for name, entry in entries.items() if name not in wanted]:
        raise CheckpointError(f"{where} has {len(unknown)} tensors the model has no place for, first {unknown[0]}: "
                              "is it a variant of the model (LoRA, quantized, more inputs)?")
    for name, tensor in wanted.items():
        entry = entries[name]
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(f"{entry.file}: tensor {entry.name} has shape {entry.shape}, expected "
                                  f"{tuple(tensor.shape)}: give the config or file that belongs to it")


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
