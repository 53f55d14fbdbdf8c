"""Write safetensors files and hub folders atomically: an error leaves nothing behind."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from .files import DTYPES
from .names import CheckpointError

WORDS = {dtype: word for word, dtype in DTYPES.items()}


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one .safetensors file or, on any error, nothing. An existing file is replaced."""
    if path.suffix != ".safetensors" or path.is_dir():
        raise CheckpointError(f"{path}: the original layout is one file, so give a name that ends in .safetensors")
    with _scratch_beside(path) as scratch:
        write_safetensors(scratch / path.name, tensors)
        os.replace(scratch / path.name, path)


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], stem: str,
                 max_shard_bytes: int | None = None) -> None:
    """Write a hub folder (weights named after `stem`, config.json) or, on any error, nothing.

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
            write_safetensors(new / f"{stem}{part}.safetensors", {name: tensors[name] for name in shard})
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
    """The names in order, split so that no shard exceeds `limit` bytes unless a single tensor does."""
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
    """A temporary folder on the same disk as `target`, always removed afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}.{uuid4().hex[:8]}.partial"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], words: Mapping[torch.dtype, str] = WORDS) -> None:
    """Write the format: the header's length in 8 bytes, the header in JSON, then the data, one tensor after the other.

    Done here rather than by the library, so that only one tensor at a time is copied to the CPU's memory.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # widest first: all are aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in words:
            raise CheckpointError(f"{file.name}: tensor {name} is {tensor.dtype}, expected one of {list(words)}")
        end = offset + tensor.nbytes
        header[name] = {"dtype": words[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
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
