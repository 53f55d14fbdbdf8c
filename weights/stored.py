"""Find a module in a checkpoint, determine its config and check every tensor, before any data are read."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from . import configs, fill, shapes
from .files import DTYPES
from .kinds import FLUX, SD3, Kind, Recognized, foreign, recognize
from .locate import Checkpoint, open_checkpoint
from .names import CheckpointError

Role = Literal["clip_l", "clip_g", "t5"]


@dataclass(frozen=True, eq=False)
class Stored:
    """One module of a checkpoint, as its headers describe it. Each call of `load` reads the data."""

    path: Path
    config: configs.Config
    recognized: Recognized
    skeleton: nn.Module  # on the meta device; without the projection that `identity` stands for
    identity: int | None = None  # width of a projection that the file lacks: it is set to the identity

    @property
    def narrowest(self) -> torch.dtype:
        """The smallest stored dtype, in bytes."""
        return min(self._dtypes, key=lambda dtype: dtype.itemsize)

    @property
    def widest(self) -> torch.dtype:
        """The largest stored dtype, in bytes."""
        return max(self._dtypes, key=lambda dtype: dtype.itemsize)

    @property
    def _dtypes(self) -> list[torch.dtype]:
        return [DTYPES[entry.dtype] for entry in self.recognized.entries.values()]

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
             keep_float8: bool = False) -> nn.Module:
        """The module, each parameter read directly into `dtype` (None: as stored) on `device`; see `load_transformer`.

        Raises CheckpointError for a dtype that is not for computation, such as float8.
        """
        if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise CheckpointError(f"dtype must be one to compute in, such as torch.bfloat16, got {dtype}: float8 "
                                  "matrices are kept by keep_float8=True")
        model, sizes = _copy_tree(self.skeleton), configs.sizes_of(self.config)
        if keep_float8 or dtype is None:
            fill.keep_float8(model, self.recognized.layout, sizes, self.recognized.entries)
        fill.fill(model, self.recognized.layout, sizes, self.recognized.entries, dtype, device)
        if self.identity:
            like = next(model.parameters())
            projection = nn.Linear(self.identity, self.identity, bias=False, dtype=like.dtype, device=like.device)
            projection.weight.data.copy_(torch.eye(self.identity))
            model.set_submodule(_module(self.recognized.kind.identity), projection)
        return model


def _copy_tree(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares its tensors, which are replaced next; a deep copy would be slow."""
    tree = copy.copy(module)
    tree.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}
    tree._modules = {name: child and _copy_tree(child) for name, child in module._modules.items()}
    return tree


def find_stored(kinds: tuple[Kind, ...], path: str | Path, folder: str | None = None, which: Role | None = None,
                config: configs.Config | None = None, family: str | None = None) -> Stored:
    """Find a module of one of the `kinds`, determine its config and check its tensors.

    `folder` is the component's folder in a hub pipeline, `which` the text encoder's role; `family` sets scaling and
    shift of an autoencoder without config.json.
    """
    checkpoint = open_checkpoint(path, folder, lambda entries: bool(_of_kinds(recognize(entries), kinds, which)))
    recognized = _choose(checkpoint, kinds, which)
    given = config is not None
    config = _find_config(recognized, checkpoint, config, family)
    with torch.device("meta"):  # names and shapes, no memory
        skeleton = recognized.kind.module(config)
    ours, sizes, identity = skeleton.state_dict(), configs.sizes_of(config), None
    projection = recognized.kind.identity
    if given and projection in ours and not recognized.entries.keys() & recognized.layout.find(projection, sizes)[0]:
        identity, columns = ours.pop(projection).shape
        if identity != columns:
            raise CheckpointError(f"{checkpoint.path} has no projection, and one of shape {(identity, columns)} cannot "
                                  "be the identity: give the file that has it, or a config without")
        skeleton.set_submodule(_module(projection), nn.Identity())
    _compare(checkpoint, recognized, {theirs: piece for _, theirs, piece in recognized.layout.split(ours, sizes)})
    return Stored(checkpoint.path, config, recognized, skeleton, identity)


def roles(path: str | Path) -> list[str]:
    """The modules in a file, or in a hub folder of one: transformer, autoencoder, clip_l, clip_g, t5, or clip for a
    CLIP text encoder of unusual sizes. Empty if none is recognized; errors as in `load_transformer`."""
    return [one.role for one in recognize(open_checkpoint(path).entries)]


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _of_kinds(modules: list[Recognized], kinds: tuple[Kind, ...], which: Role | None) -> list[Recognized]:
    """The modules of these kinds and, as far as it can be told, of this role."""
    roles = (None, which, *(("clip",) if which in ("clip_l", "clip_g") else ()))
    return [one for one in modules if one.kind in kinds and (which is None or one.role in roles)]


def _choose(checkpoint: Checkpoint, kinds: tuple[Kind, ...], which: Role | None) -> Recognized:
    """The one module of these kinds and this role. Raises CheckpointError if there are none or several."""
    modules = recognize(checkpoint.entries)
    found = _of_kinds(modules, kinds, which)
    has_transformer = any(one.kind in (FLUX, SD3) for one in modules)
    if not has_transformer and (what := foreign(checkpoint.entries)):
        raise CheckpointError(f"{checkpoint.path} is {what}")
    if len(found) == 1:
        return found[0]
    wanted = which or " or ".join(dict.fromkeys(kind.name for kind in kinds))
    if found:
        names = ", ".join(f"{one.role} ({one.prefix}{one.layout.sign})" for one in found)
        told_apart = which is None and len({one.role for one in found}) == len(found)
        remedy = f"say which={found[-1].role!r}, for example" if told_apart else "give a file with one of them"
        raise CheckpointError(f"{checkpoint.path} holds several of these, {names}: {remedy}")
    if modules:
        held = " and ".join(f"{one.kind.name} ({one.layout.name} layout)" for one in modules)
        raise CheckpointError(f"{checkpoint.path} holds no {wanted} but {held}: give another file")
    signs = " or ".join(dict.fromkeys(layout.sign for kind in kinds for layout in kind.layouts))
    first = next(iter(checkpoint.entries), "no tensor at all")
    raise CheckpointError(f"{checkpoint.path}: unknown layout; expected a tensor {signs}, found {first}: is it another "
                          "part of the model, or one of several shards?")


def _find_config(recognized: Recognized, checkpoint: Checkpoint, config: configs.Config | None,
                 family: str | None) -> configs.Config:
    """The given config, else that of config.json, else the one that follows from the shapes; it must fit the shapes."""
    kind, stored = recognized.kind, shapes.Shapes(recognized.entries, recognized.layout, recognized.prefix)
    try:
        if config is not None and not isinstance(config, kind.config):
            raise CheckpointError(f"config is a {type(config).__name__}, expected a {kind.config.__name__}")
        found = kind.fields(stored)
        if config is None and checkpoint.config is not None and recognized.layout in (kind.hub, kind.bare):
            config = kind.from_hub(checkpoint.config)
        if config is None:
            latents = {} if family is None else shapes.LATENTS[family]
            return kind.config(**kind.rest(stored, found) | found | latents)
        for name, value in found.items():
            if getattr(config, name) != value:
                raise CheckpointError(f"the config says {name} {getattr(config, name)!r}, the tensors say {value!r}: "
                                      "give the config that belongs to these weights")
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return config


def _compare(checkpoint: Checkpoint, recognized: Recognized, wanted: Mapping[str, Tensor]) -> None:
    """Check that the file has exactly the wanted tensors, each in its shape and a supported dtype."""
    where, entries = f"{checkpoint.path} ({recognized.layout.name} layout)", recognized.entries
    if missing := [name for name in wanted if name not in entries]:
        raise CheckpointError(f"{where} lacks {len(missing)} of {len(wanted)} tensors, first "
                              f"{recognized.prefix}{missing[0]} of shape {tuple(wanted[missing[0]].shape)}: "
                              "is it one of several shards, or cut short?")
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
