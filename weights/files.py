"""Where a checkpoint is, and what its headers say: paths, names on the hub, shards, the entries of tensors.

Headers are read by the safetensors library; `load.map_file` maps the numbers, which are read when they are used. Names
on the hub are found in the cache, or downloaded, by huggingface_hub.
"""

import json
import os
import re
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .checkpoints import BUNDLED
from .layouts import CheckpointError
from .nvfp4 import BLOCK, scales_shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # supported dtypes by safetensors' names
FLOAT8 = ("F8_E4M3", "F8_E5M2")
NVFP4 = "NVFP4"  # of an entry whose numbers are two a byte, with two scales; see `weights.nvfp4`
SUFFIXES = (".safetensors", ".sft")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
STEMS = ("diffusion_pytorch_model", "model")  # how the hub names weight files: diffusers', transformers'
PICKLE = "a pickle, which can run any code when opened: use the .safetensors release"
OTHER_FORMATS = {  # first bytes of other formats that are often found under the name .safetensors
    b"PK\x03\x04": PICKLE, b"\x80\x02": PICKLE,
    b"GGUF": "a GGUF file, whose quantized weights are not supported: use the .safetensors release",
    b"version ": "a Git LFS pointer, not the file it points to: download it, for example with `hf download`",
    b"<": "a web page, not a checkpoint: the download needs the license accepted and a token (`hf auth login`)",
    b"{": "JSON, not a checkpoint: give the .safetensors file",
}


class TensorEntry(NamedTuple):
    """One tensor in a file: the file, its full name there, its dtype (safetensors' name) and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: "TensorEntry | None" = None  # float8: the factor, or one a row, of the numbers; NVFP4: one a block

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _bits(self.dtype) // 8


def _bits(dtype: str) -> int:
    return int(re.search(r"\d+|$", dtype)[0] or 8)  # BOOL: 8


# ---- headers


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The entry of every tensor. Raises FileNotFoundError, or CheckpointError that says what is wrong with the file."""
    try:
        with safe_open(file, "np") as opened:  # which maps files beyond the memory's size too
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: TensorEntry(file, name, tensor.get_dtype(), tuple(tensor.get_shape()))
                    for name, tensor in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is {_what_else(file) or f'damaged ({error}): download it again'}") from error


def _what_else(file: Path) -> str | None:
    """What a file that safetensors refuses is: another format, or in which tensor it is cut short or damaged."""
    content, size = file.open("rb"), file.stat().st_size
    with content:
        first = content.read(8)
        length = int.from_bytes(first, "little")
        if length > 100_000_000:  # the library's limit
            return next((what for magic, what in OTHER_FORMATS.items() if first.startswith(magic)), None)
        if 8 + length > size:
            return f"an interrupted download: it has {size:,} bytes, fewer than its header: download it again"
        head = content.read(length)
    try:
        header = {name: about for name, about in json.loads(head).items() if name != "__metadata__"}
        whole = 8 + length + max(about["data_offsets"][1] for about in header.values())
        for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = about["data_offsets"]
            if end - start != prod(about["shape"]) * _bits(about["dtype"]) // 8:
                return f"damaged: tensor {name} has {end - start:,} bytes, not those of its shape: download it again"
            if 8 + length + end > size:
                return f"an interrupted download: {size:,} of {whole:,} bytes, up to tensor {name}: download it again"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def list_tensors(weights: Path) -> dict[str, TensorEntry]:
    """The entries of one file, or of all shards that an index lists, each scale in the entry of its matrix."""
    if weights.suffix != ".json":
        return _attach_scales(read_header(weights))
    weight_map, entries = read_json(weights).get("weight_map"), {}
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{weights} has no "weight_map" from tensor names to files: download it again')
    for shard in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\\0]+\.(safetensors|sft)", shard):
            raise CheckpointError(f"{weights} points to {shard!r}, no weights in its own folder: do not trust it")
        if not os.path.isfile(weights.parent / shard):  # False for names that are too long, too
            raise FileNotFoundError(f"{weights.parent / shard} is missing: an interrupted download, run it again")
        entries |= read_header(weights.parent / shard)
    for name in entries.keys() | weight_map.keys():
        if name not in entries or entries[name].file.name != weight_map.get(name):
            raise CheckpointError(f"{weights} and its shards disagree on tensor {name}: download them again")
    return _attach_scales(entries)


def read_tekken(file: Path) -> bytes | None:
    """Mistral's tokenizer, the content of a tekken.json, which ComfyUI's file of the model holds as a tensor; None: the
    file has none."""
    with safe_open(file, "np") as opened:
        name = next((name for name in opened.keys() if name.endswith("tekken_model")), None)  # noqa: SIM118
        return name and opened.get_tensor(name).tobytes()


def _attach_scales(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Move the scale stored beside a float8 matrix into the matrix's entry.

    ComfyUI's files hold `X.scale_weight` (with a marker `scaled_fp8`) or `X.weight_scale` beside `X.weight`. Their
    scales for quantizing a layer's input are ignored: here weights are converted to a wider dtype before they are used.
    """
    found = {name: entry for name, entry in entries.items()
             if not name.endswith(("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant"))}
    for name in [name for name in found if name.endswith((".scale_weight", ".weight_scale"))]:
        scale, weight = found[name], found.get(name.rpartition(".")[0] + ".weight")
        if weight is not None and weight.dtype in FLOAT8:
            if weight.scale or scale.dtype not in DTYPES or scale.shape not in (
                    (), (1,), (1, 1), weight.shape[:1], (*weight.shape[:1], 1)):
                raise CheckpointError(f"{scale.file}: tensor {name} is {scale.dtype} of shape {scale.shape}, expected "
                                      f"one scale for {weight.name}, or one for each of its rows: use another release")
            found[weight.name] = weight._replace(scale=found.pop(name))
    for name in [name for name in found if name.endswith(".weight_scale_2")]:
        matrix = _nvfp4(*(found.pop(name.removesuffix("weight_scale_2") + ending, None)
                          for ending in ("weight", "weight_scale", "weight_scale_2")))
        found[matrix.name] = matrix
    return found


def _nvfp4(packed: TensorEntry | None, scales: TensorEntry | None, scale: TensorEntry) -> TensorEntry:
    """The entry of a matrix that is stored in three tensors; see `weights.nvfp4`."""
    about = [(entry.dtype, *entry.shape) for entry in (packed, scales, scale) if entry]
    rows, columns = (about[0][1], 2 * about[0][2]) if len(about[0]) == 3 else (0, 0)
    wanted = [("U8", rows, columns // 2), ("F8_E4M3", *scales_shape(rows, columns)), ("F32",)]
    if about != wanted or columns % BLOCK:
        raise CheckpointError(f"{scale.file}: tensor {scale.name} belongs to a matrix in nvfp4, but matrix, scales and "
                              f"scale are {about}: use another release")
    return packed._replace(dtype=NVFP4, shape=(rows, columns), scale=scales._replace(scale=scale))


def find_weights(folder: Path) -> Path | None:
    """The weights in a folder under the hub's names, one file or an index of shards, plain names before variants such
    as fp16; None where there are none."""
    endings = (".safetensors", ".safetensors.index.json", ".safetensors.index*.json", "*.safetensors", "*.bin")
    found = (file for end in endings for stem in STEMS for file in sorted(folder.glob(stem + end)) if file.exists())
    return next(found, None)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where the file is missing. Raises CheckpointError for anything else."""
    if not file.exists():
        return None
    try:
        return {**json.loads(file.read_bytes())}  # a TypeError for what is no object
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON object ({error}): download it again") from error


# ---- the hub


def resolve(path: str | os.PathLike, component: str | None = None, download: bool = True) -> Path:
    """The file or folder that a path, a bundled checkpoint's name or a repository's name stands for.

    A name `org/name` that is not a path is looked up in huggingface_hub's cache; what the cache lacks of the pipeline,
    or of its folder `component`, is downloaded. With `download` False a cached snapshot is returned even if it is not
    whole. A cache's folder `models--org--name` stands for its snapshot. Raises FileNotFoundError if there is nothing.
    """
    text, path = str(path), Path(path)
    if path.is_dir() and (main := path / "refs" / "main").is_file():
        path = path / "snapshots" / main.read_text().strip()
    if text in BUNDLED or path.exists():
        return BUNDLED.get(text, path)
    if path.suffix in (*SUFFIXES, *PICKLES, ".gguf", ".json") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise FileNotFoundError(f"{text} does not exist: give a .safetensors file, a folder with one, one of "
                                f"{', '.join(BUNDLED)}, or a name on the hub such as black-forest-labs/FLUX.1-dev")
    from huggingface_hub import snapshot_download  # here, since it takes longer than everything above

    read = ["model_index.json", *(f"{component or '*'}/*.{end}" for end in ("json", "txt", "model", "safetensors"))]
    lacks = "every file"
    for online in (False, True)[: 1 + download]:
        try:  # the files of a pipeline's folders that are read: not the original files there, nor float16 variants
            snapshot = Path(snapshot_download(text, local_files_only=not online, allow_patterns=read,
                                              ignore_patterns=["text_encoders/*", "*.fp16*"]))
            lacks, reason = lacking(snapshot, component), "it is not in the hub's folder layout"
            if lacks is None or not download:
                return snapshot
        except Exception as error:  # raised by several packages, without a common class
            reason = shorten(str(error), 200)
    raise FileNotFoundError(f"{text}: the hub's cache lacks {lacks}, and there is no download of it ({reason}): check "
                            "name and network, accept the license on its page, run `hf auth login`, then `hf download "
                            f"{text}`, or `hf download {text} FILE` and give the path that it prints")


def lacking(folder: Path, component: str | None = None) -> str | None:
    """The first part of a hub folder that is not there or not whole, though model_index.json or an index of shards
    names it: a download was interrupted. None: nothing is missing. With `component`, of that folder alone."""
    index = read_json(folder / "model_index.json") or {}
    listed = [name for name, about in index.items() if isinstance(about, list) and all(about)]
    for name in [component] if component else listed:
        here = {file.name for file in (folder / name).glob("*") if file.exists()}  # a link may lead nowhere
        texts = [(folder / name / file).read_text(encoding="utf-8") for file in here if file.endswith(".index.json")]
        shards = {shard for text in texts for shard in re.findall(r'"([^"]+\.safetensors)"', text)}
        if shards - here:
            return f"{name}/{min(shards - here)}"
        network = name.startswith(("transformer", "vae", "text_encoder"))
        if not here or network and not any(file.endswith(SUFFIXES) for file in here):
            return f"{name}/"
    return None if listed or component else "model_index.json"
