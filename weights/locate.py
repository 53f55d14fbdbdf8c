"""Find the tensors at a user's path: a file, a hub folder, the folder around it, or a name on the hub."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import PICKLES, TensorEntry, attach_scales, parse_object, read_header
from .hub import resolve
from .names import CheckpointError

STEMS = ("diffusion_pytorch_model", "model")  # how the hub names weight files: diffusers', transformers'


@dataclass
class Checkpoint:
    """The checkpoint at a path: every tensor's entry, and the hub's config.json beside the weights."""

    path: Path  # for error messages
    entries: dict[str, TensorEntry]
    config: dict[str, Any] | None


def open_checkpoint(path: str | Path, component: str | None = None,
                    wanted: Callable[[Mapping[str, TensorEntry]], bool] | None = None) -> Checkpoint:
    """Find and list the weights at `path`: a .safetensors file, a folder of the hub's layout, a folder that holds
    such a folder named `component`, or a name on the hub (see `hub.resolve`).

    `wanted` selects among several checkpoints in a folder. Raises FileNotFoundError for a missing file or shard,
    CheckpointError for a damaged file, a pickle, or an ambiguous path.
    """
    path = resolve(path, component)
    if path.is_dir() and component and (path / component).is_dir():
        path = path / component
    weights = find_weights(path, wanted) if path.is_dir() else path
    if path.is_dir() and weights.parent == path and not weights.name.startswith(STEMS):
        path = weights  # an original file in a folder
    is_hub = path.is_dir() or weights.name.startswith(STEMS)  # beside an original file, config.json is another's
    config = read_json(weights.parent / "config.json") if is_hub else None
    return Checkpoint(path, list_tensors(weights), config)


def list_tensors(weights: Path) -> dict[str, TensorEntry]:
    """The entries of one file, or of all shards that an index lists."""
    return attach_scales(_read_index(weights) if weights.suffix == ".json" else read_header(weights))


def find_weights(folder: Path, wanted: Callable[[Mapping[str, TensorEntry]], bool] | None = None) -> Path:
    """The weights of a folder: one file or an index of shards, the hub's plain names before variants such as fp16."""
    for stem in STEMS:
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).exists():
                return folder / name
    for pattern in ("*.safetensors.index*.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1 and wanted:
            found = [file for file in found if wanted(list_tensors(file))] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{folder} holds {len(found)} checkpoints: give one, such as {found[0]}")
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLES):
        read_header(pickles[0])  # raises for pickles
    inner = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or "none"
    raise FileNotFoundError(f"{folder} holds no .safetensors file: give the file or its folder (folders here: {inner})")


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where the file is missing."""
    if not file.exists():
        return None
    try:
        return parse_object(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON object ({error}): download it again") from error


def _read_index(index: Path) -> dict[str, TensorEntry]:
    """The tensors of all shards that a hub index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to files: download it again')
    shards = {}
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{index} points to {shard!r}, outside its own folder: do not trust this download")
        if not os.path.isfile(index.parent / shard):  # False for names that are too long, too
            raise FileNotFoundError(f"{index.parent / shard} is missing, which {index.name} names: download it again")
        shards[shard] = read_header(index.parent / shard)
    unlisted = [(name, shard) for shard, entries in shards.items() for name in entries if name not in weight_map]
    if unlisted:
        name, shard = unlisted[0]
        raise CheckpointError(f"{index.parent / shard} holds tensor {name}, which {index.name} does not list: "
                              "download both again")
    entries = {}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index.parent / shard} lacks tensor {name}, which {index.name} lists: "
                                  "download both again")
        entries[name] = shards[shard][name]
    return entries
