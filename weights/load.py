"""Fill modules with stored numbers: tensors stay views of the mapped file where nothing about them has to change."""

import json
import mmap
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import mmdit
from mmdit.float8 import keep_in_float8, may_stay_float8
from mmdit.meta import on_meta

from . import configs
from .detect import DECODER, ENCODERS, Part, PathLike, find_parts
from .files import DTYPES, FLOAT8, NVFP4, TensorEntry
from .layouts import UNCHANGED, CheckpointError
from .nvfp4 import widen


def load_transformer(path: PathLike, config: mmdit.MMDiTConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu", keep_float8: bool = False) -> mmdit.MMDiT:
    """An MMDiT from an original or merged file of FLUX.1, FLUX.2 or SD3, from a `transformer/` folder, from the
    folder around it, or from a name on the hub (`resolve`).

    Without `config` the sizes come from names and shapes and, for hub weights, config.json; 64-wide heads are assumed
    where neither shows their width (SD3-medium), the public rotary axes for 128-wide heads. A config must agree with
    the tensors. `dtype` None keeps the stored dtype. On the CPU, tensors that are stored as they are used here stay
    views of the mapped file, in memory of the system's cache, and cost none of the process. `keep_float8` keeps float8
    weights of the blocks in float8 and converts each layer's when it runs (always so with `dtype` None). The other
    networks of a merged file are ignored. Raises CheckpointError (a ValueError) for a file that does not fit,
    FileNotFoundError for a missing one.
    """
    return _open(path, ["transformer"], "transformer", config).load(dtype, device, keep_float8)


def load_autoencoder(path: PathLike, config: mmdit.AutoencoderConfig | None = None, dtype: torch.dtype | None = None,
                     device: str | torch.device = "cpu",
                     family: Literal["flux", "sd3"] | None = None) -> mmdit.Autoencoder:
    """An autoencoder from FLUX.1's or FLUX.2's ae.safetensors, an original SD3 file, a merged file, a `vae/` folder, or
    the folder around it.

    A file without config.json does not hold the latents' scaling and shift (FLUX.2's has statistics in their place):
    without `config` they are those of the `family`, else SD3's where an original file has SD3's prefix
    `first_stage_model.`, FLUX.1's where it has not, and norms have 32 groups. The rest is as in `load_transformer`.
    """
    return _open(path, ["autoencoder"], "vae", config, family).load(dtype, device)


def load_text_encoder(path: PathLike, config: mmdit.ClipConfig | mmdit.T5Config | mmdit.DecoderConfig | None = None,
                      dtype: torch.dtype | None = None, device: str | torch.device = "cpu", keep_float8: bool = False,
                      which: Literal["clip_l", "clip_g", "t5", "text"] | None = None,
                      ) -> mmdit.ClipTextEncoder | mmdit.T5Encoder | mmdit.TextDecoder:
    """A CLIP, a T5 or a decoder (Qwen3, Mistral), told apart by tensor names, from a file or a `text_encoder*/` folder.

    `which` chooses in a merged file that holds several. An original CLIP file does not hold everything: without
    `config` heads are 64 wide, the activation is quick_gelu at width 768 (CLIP-L) and gelu otherwise (CLIP-G), the
    end token is the vocabulary's last. A Mistral's heads are then 128 wide. Of a decoder, the layers behind the last
    one that the context needs, the head and the vision tower are never read. The rest is as in `load_transformer`.
    """
    return _open(path, [which] if which else ENCODERS, None, config).load(dtype, device, keep_float8)


def _open(path: PathLike, roles: Sequence[str], component: str | None, *config: object) -> "Stored":
    part, *others = find_parts(path, roles, component)
    if others:
        names = ", ".join(f"{part.role} ({part.path.name}: {part.prefix}*)" for part in (part, *others))
        raise CheckpointError(f"{path} holds several of these, {names}: say which={others[-1].role!r}, for example")
    return open_part(part, *config)


@dataclass(frozen=True, eq=False)
class Stored:
    """One network whose names, shapes and dtypes are all as its config wants them. Each call of `load` reads it."""

    part: Part
    config: configs.Config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in that is stored: the widest, with float8 counted as bfloat16."""
        return _joint_dtype(self.part.entries.values())

    def load(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
             keep_float8: bool = False) -> nn.Module:
        """The module in `dtype` (None: as stored) on `device`; see `load_transformer`."""
        model, state = self.read(dtype, device, keep_float8)
        model.load_state_dict(state, assign=True)
        return model

    def read(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", keep_float8: bool = False,
             own: Callable[[int], slice] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """The module on the meta device, and its tensors; with `own`, of a parameter with n rows own(n) alone."""
        if unused := self.part.unused:
            warnings.warn(f"{self.part.path}: {len(unused)} stray tensors passed over, first {unused[0]}", stacklevel=4)
        model, sizes = on_meta(self.part.kind.module, self.config), configs.sizes_of(self.config)
        state, opened = {}, cache(map_file)
        for name, whole in model.state_dict(keep_vars=True).items():
            theirs, transform = self.part.layout.find(name, sizes)
            parts, (owner, _, ending) = [self.part.entries[their] for their in theirs], name.rpartition(".")
            layer, target = model.get_submodule(owner), dtype or _joint_dtype(parts)
            float8 = {part.dtype for part in parts} == {parts[0].dtype} <= {*FLOAT8} and ending == "weight"
            if float8 and may_stay_float8(owner, layer) and (keep_float8 or dtype is None):
                target = DTYPES[parts[0].dtype]
                if scaled := any(part.scale for part in parts):
                    state[f"{owner}.scale"] = transform.read(
                        torch.cat([_scale(part, opened) for part in parts]), sizes.patch).to(device)
                model.set_submodule(owner, keep_in_float8(layer, target, scaled))
                parts = [part._replace(scale=None) for part in parts]
            rows = own(len(whole)) if own and isinstance(whole, nn.Parameter) else None
            tensors = [_read(part, target, opened, part_rows)
                       for part, part_rows in _own_rows(parts, rows if transform is UNCHANGED else None)]
            tensor = transform.read(torch.cat(tensors) if len(tensors) > 1 else tensors[0], sizes.patch)
            if rows is not None and transform is not UNCHANGED:
                tensor = tensor[rows].clone()
            state[name] = tensor.to(device).contiguous()
        return model, state


def map_file(file: Path) -> Callable[[TensorEntry], Tensor]:
    """The file's tensors as views of a private (copy-on-write) mapping, which reserves no memory: unlike with the
    library's mapping, a file may be larger than the memory."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header, linux = json.loads(opened.read(length)), {"flags": mmap.MAP_PRIVATE | 0x4000}  # MAP_NORESERVE
        data = mmap.mmap(opened.fileno(), 0, **(linux if sys.platform == "linux" else {"access": mmap.ACCESS_COPY}))

    def read(entry: TensorEntry) -> Tensor:
        about, count = header[entry.name], prod(entry.shape)
        if (about["dtype"], about["shape"]) != (entry.dtype, [*entry.shape]):
            raise ValueError(f"tensor {entry.name} is another")
        dtype, offset = {**DTYPES, "U8": torch.uint8}[entry.dtype], 8 + length + about["data_offsets"][0]
        numbers = torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else torch.empty(0)
        return numbers.view(entry.shape)

    return read


def read_stored(entry: TensorEntry, opened: Callable = map_file) -> Tensor:
    """A tensor as it is stored, without its scale: a view of the mapped file."""
    try:
        tensor = opened(entry.file)(entry)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{entry.file} has changed since it was recognized ({error}): load it again") from error
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor  # after a header of odd length


def _own_rows(parts: Sequence[TensorEntry], rows: slice | None) -> Iterator[tuple[TensorEntry, slice]]:
    """What of each part is in these rows of all, one below the other (None: all)."""
    start = 0
    for part in parts:
        yield part, slice(None) if rows is None else slice(max(0, rows.start - start), max(0, rows.stop - start))
        start += part.shape[0] if part.shape else 1


def _read(entry: TensorEntry, dtype: torch.dtype, opened: Callable, own: slice) -> Tensor:
    """Some rows of a stored tensor times its scale, in `dtype`."""
    if entry.dtype == NVFP4:
        packed = entry._replace(dtype="U8", shape=(entry.shape[0], entry.shape[1] // 2))
        stored = (read_stored(part, opened) for part in (packed, entry.scale, entry.scale.scale))
        return widen(*stored)[own].to(dtype)
    tensor = read_stored(entry, opened)
    tensor = tensor[own] if entry.shape else tensor
    rows = _scale(entry, opened)[own].view(-1, *[1] * max(0, tensor.ndim - 1)) if entry.scale else None
    return (tensor if rows is None else tensor.float() * rows).to(dtype)


def _scale(entry: TensorEntry, opened: Callable) -> Tensor:
    """The scale of each row of a matrix: (rows, 1) float32."""
    scale = read_stored(entry.scale, opened).float() if entry.scale else torch.ones(())
    return scale.reshape(-1, 1).expand(*entry.shape[:1] or (1,), 1)


def _joint_dtype(parts: Iterable[TensorEntry]) -> torch.dtype:
    """The dtype that the parts' dtypes promote to, with float8 and nvfp4 counted as bfloat16."""
    dtypes = (torch.bfloat16 if part.dtype in (*FLOAT8, NVFP4) else DTYPES[part.dtype] for part in parts)
    return reduce(torch.promote_types, dtypes)


def open_part(part: Part, config: configs.Config | None = None, family: str | None = None) -> Stored:
    """A network with its config; every name, shape and dtype is checked before a number is read.

    The config is the given one, else it follows from the tensors and, for hub weights, config.json; `family` sets
    scaling and shift of an autoencoder without config.json. Raises CheckpointError naming the file and the tensor.
    """
    try:
        config = configs.find_config(part, config, family)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{part.path}: {error}") from error
    part = without_rest(part, config.num_layers) if part.kind is DECODER else part
    stored = Stored(part, config)
    parts = part.layout.split(on_meta(part.kind.module, stored.config).state_dict(), configs.sizes_of(stored.config))
    wanted, entries = {theirs: tuple(tensor.shape) for _, theirs, tensor in parts}, part.entries
    where = f"{part.path} ({part.layout.name} layout)"
    if missing := [name for name in wanted if name not in entries]:
        raise CheckpointError(f"{where} lacks {len(missing)} of {len(wanted)} tensors, first {part.prefix}{missing[0]} "
                              f"of shape {wanted[missing[0]]}: is it one of several shards, or cut short?")
    for name, entry in entries.items():
        if name not in wanted:
            raise CheckpointError(f"{where} has {len(entries) - len(wanted)} tensors the model has no place for, first "
                                  f"{entry.name}: is it a variant of the model (LoRA, quantized, more inputs)?")
        if entry.shape != wanted[name] or entry.dtype not in (*DTYPES, NVFP4):
            raise CheckpointError(f"{entry.file}: tensor {entry.name} is {entry.dtype} of shape {entry.shape}, expected"
                                  f" {wanted[name]} of {', '.join(DTYPES)}: give the config or file that belongs to it")
    return stored


def without_rest(part: Part, layers: int) -> Part:
    """The part of a language model that makes the context: without later layers and the final norm."""
    numbers = {name: re.match(r"layers\.(\d+)\.", name) for name in part.entries if name != "norm.weight"}
    return replace(part, entries={name: part.entries[name] for name, number in numbers.items()
                                  if number is None or int(number[1]) < layers})
