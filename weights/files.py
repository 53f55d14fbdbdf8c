"""safetensors files and folders: what is in them, reading one tensor at a time, and writing all or nothing."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .names import CheckpointError

STEMS = ("diffusion_pytorch_model", "model")  # how the hub names weight files: diffusers', transformers'
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its full name there, its stored dtype (safetensors' word) and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """An open checkpoint: every tensor's entry, and the numbers on demand."""

    path: Path  # what error messages name
    entries: dict[str, Entry]
    config: dict[str, Any] | None  # the hub's config.json beside the weights
    _open: dict[Path, Any] = field(default_factory=dict)

    def read(self, entry: Entry, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """One tensor, in its stored dtype where `dtype` is None. Raises CheckpointError for one that is no float."""
        if entry.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is stored as {entry.dtype}, expected one of "
                f"{', '.join(DTYPES.values())}: convert the file first"
            )
        if entry.file not in self._open:
            self._open[entry.file] = open_safetensors(entry.file)
        return self._open[entry.file].get_tensor(entry.name).to(device, dtype)


def open_checkpoint(path: str | os.PathLike, component: str | None = None) -> Checkpoint:
    """Find and list the weights at `path`: a .safetensors file, a folder of the hub's layout, or a folder that holds
    such a folder named `component`.

    Raises FileNotFoundError for a missing file or shard, CheckpointError for a file that is damaged, a pickle, or
    not clearly the one meant.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a .safetensors file or a folder with one")
    if path.is_dir() and component and (path / component).is_dir():
        path = path / component
    weights = _find_weights(path) if path.is_dir() else path
    entries = _read_index(weights) if weights.suffix == ".json" else _list_tensors(weights)
    is_hub = path.is_dir() or weights.name.startswith(STEMS)  # beside an original file, a config.json is not its own
    config = _read_json(weights.parent / "config.json") if is_hub else None
    return Checkpoint(path, entries, config)


def open_safetensors(file: Path) -> Any:
    """A `safe_open` handle. Raises CheckpointError, with the reason, for a file that is not whole and valid."""
    if file.suffix in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which can run any code when opened: use the .safetensors release or convert it"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file: download it again")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({reason}; {file.stat().st_size:,} bytes): download it again"
        ) from error


def _list_tensors(file: Path) -> dict[str, Entry]:
    handle = open_safetensors(file)
    entries = {}
    for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
        header = handle.get_slice(name)
        entries[name] = Entry(file, name, header.get_dtype(), tuple(header.get_shape()))
    return entries


def _find_weights(folder: Path) -> Path:
    """The weights of a hub folder: one file or an index of shards, plain names before variants such as fp16."""
    for stem in STEMS:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).exists():
                return folder / name
    for pattern in ("*.safetensors.index*.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{folder} holds {len(found)} checkpoints: give one, such as {found[0]}")
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        open_safetensors(pickles[0])  # says why not
    inner = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or "none"
    raise FileNotFoundError(f"{folder} holds no .safetensors file: give the file or its folder (folders here: {inner})")


def _read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where the file is missing."""
    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a JSON object: download it again")
    return content


def _read_index(index: Path) -> dict[str, Entry]:
    """The tensors of all shards that a hub index names."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to files: download it again')
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise CheckpointError(f"{index} points to {shard!r}, outside its own folder: do not trust this download")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} is missing, which {index.name} names: download it again")
        shards[shard] = _list_tensors(index.parent / shard)
    entries = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index.parent / shard} lacks tensor {name}, which {index.name} promises: "
                                  "download both again")
        entries[name] = shards[shard][name]
    return entries


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one .safetensors file: the whole of it or, on any error, nothing. An existing file is replaced."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise CheckpointError(f"{path}: the original layout is one file, so give a name that ends in .safetensors")
    with _scratch_beside(path) as scratch:
        _write_safetensors(scratch / path.name, tensors)
        os.replace(scratch / path.name, path)


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], stem: str,
                 max_shard_bytes: int | None = None) -> None:
    """Write a hub folder (weights named after `stem`, config.json): the whole of it or, on any error, nothing.

    More than `max_shard_bytes` go into shards with an index. An existing checkpoint folder is replaced; raises
    CheckpointError where `path` is a file, or a folder with anything else in it.
    """
    if path.suffix == ".safetensors" or (path.exists() and not path.is_dir()):
        raise CheckpointError(f"{path}: the hub layout is a folder, so give a folder's name")
    foreign = [p.name for p in path.iterdir() if not _is_checkpoint_part(p)] if path.exists() else []
    if foreign:
        raise CheckpointError(f"{path} holds more than a checkpoint ({foreign[0]}) and would be replaced: give another")
    shards = _shards(tensors, max_shard_bytes)
    with _scratch_beside(path) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            _write_safetensors(new / f"{stem}{part}.safetensors", {name: tensors[name] for name in shard})
            weight_map |= dict.fromkeys(shard, f"{stem}{part}.safetensors")
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
            (new / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise


def _is_checkpoint_part(file: Path) -> bool:
    return file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json"))


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """The names in order, cut so that no shard exceeds `limit` bytes unless a single tensor does."""
    if limit is not None and limit < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, got {limit}")
    shards, room = [[]], limit
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room = None if limit is None else room - tensor.nbytes
    return shards


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk as `target`, gone afterwards whatever happens."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid4().hex[:8]}.partial"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """The format: the header's length in 8 bytes, the header in JSON, then the numbers, one tensor after the other.

    Written here rather than by the library so that one tensor at a time passes through memory, from any device.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # wide first: all lie aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{file.name}: tensor {name} is {tensor.dtype}, expected one of {list(DTYPES)}")
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            numbers = bytearray(tensor.nbytes)
            torch.frombuffer(numbers, dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
            out.write(numbers)
        out.flush()
        os.fsync(out.fileno())
