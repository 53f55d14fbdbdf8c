"""safetensors files: listing the tensors from the header alone, and reading one tensor at a time.

The format: the header's length in 8 bytes, the header in JSON, then the data, one tensor after the other. The header is
parsed here rather than by the library, so that an error names the tensor. The data are read directly into the
parameters rather than memory-mapped, so that a loaded model exists once in memory and no longer depends on its file.
"""

import ctypes
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .names import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # supported dtypes by safetensors' names
FLOAT8 = ("F8_E4M3", "F8_E5M2")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I64": 8, "I32": 4,
         "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}
LONGEST_HEADER = 100_000_000  # the library's limit
PIECE = 1 << 22  # numbers per read, where they are converted after reading
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
OTHER_FORMATS = {  # first bytes of other formats that are often found under the name .safetensors
    b"PK\x03\x04": "a pickle of PyTorch, which can run any code when opened: use the .safetensors release",
    b"\x80\x02": "a pickle, which can run any code when opened: use the .safetensors release",
    b"GGUF": "a GGUF file, whose quantized weights are not supported: use the .safetensors release",
    b"version ": "a Git LFS pointer, not the file it points to: download it, for example with `hf download`",
    b"<": "a web page, not a checkpoint: the download needs the license accepted and a token (`hf auth login`)",
    b"{": "JSON, not a checkpoint: give the .safetensors file",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file: the file, its full name there, its dtype (safetensors' name), shape and position."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # offset of its first byte in the file
    scale: "TensorEntry | None" = None  # for float8: the factor, or one factor per row, of the numbers

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The entry of every tensor. Raises FileNotFoundError, or CheckpointError for a truncated or invalid file."""
    if file.suffix in PICKLES:
        raise CheckpointError(
            f"{file} is a pickle, which can run any code when opened: use the .safetensors release or convert it"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file: download it again")
    with file.open("rb") as opened:
        header, start = _header_json(opened, file)
        size = os.fstat(opened.fileno()).st_size
    notes = header.pop("__metadata__", None)
    if notes is not None and not (isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values())):
        raise _damaged(file, "the header's __metadata__ does not map names to strings")
    entries = {name: _entry(file, name, about, start) for name, about in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise _damaged(file, f"tensor {entry.name} {kind}: it starts at byte {entry.start:,}, expected {end:,}")
        end += entry.nbytes
        if end > size:
            raise _damaged(file, f"tensor {entry.name} ends at byte {end:,}, the file at {size:,}")
    if end != size:
        raise _damaged(file, f"{size - end:,} bytes belong to no tensor")
    return entries


def _header_json(opened: BinaryIO, file: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the first tensor's data."""
    size = os.fstat(opened.fileno()).st_size
    first = opened.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > LONGEST_HEADER:
        for magic, what in OTHER_FORMATS.items():
            if first.startswith(magic):
                raise CheckpointError(f"{file} is {what}")
    if len(first) < 8:
        raise _damaged(file, f"it has {size} bytes, fewer than the length of a header")
    if length > min(size - 8, LONGEST_HEADER):
        raise _damaged(file, f"its header would be {length:,} bytes long, the file has {size:,}")
    try:
        return parse_object(opened.read(length)), 8 + length
    except ValueError as error:
        raise _damaged(file, f"its header is no JSON object: {error}") from error


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object, as strictly as the safetensors library. Raises ValueError for anything else."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs in it twice")
        return dict(pairs)

    def no_number(word: str) -> None:  # Python's own NaN and Infinity
        raise ValueError(f"{word} is no number")

    def whole(digits: str) -> int | float:
        return float(digits) if digits == "-0" else int(digits)

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_number,
                           parse_int=whole)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # fails for half of a surrogate pair
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}")
    return found


def _entry(file: Path, name: str, about: Any, start: int) -> TensorEntry:
    about = about if isinstance(about, dict) else {}
    dtype, shape, offsets = (about.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise _damaged(file, f"the header's entry for tensor {name} is not one of dtype, shape and data_offsets")
    if dtype not in BYTES:
        raise CheckpointError(f"{file}: tensor {name} is stored as {dtype}, expected one of {', '.join(DTYPES)}: "
                              "use another release of the model")
    entry = TensorEntry(file, name, dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise _damaged(file, f"tensor {name} has {offsets[1] - offsets[0]:,} bytes, but shape {entry.shape} of {dtype} "
                       f"needs {entry.nbytes:,}")
    return entry


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or no safetensors file ({reason}): download it again")


def attach_scales(entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Move the scale stored beside a float8 matrix into the matrix's entry.

    ComfyUI's files hold `X.scale_weight` (with a marker `scaled_fp8`) or `X.weight_scale` beside `X.weight`. Their
    scales for quantizing a layer's input are ignored: here weights are converted to a wider dtype before they are used.
    """
    found = {name: entry for name, entry in entries.items()
             if not name.endswith(("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant"))}
    for name in list(found):
        stem = name.removesuffix(".scale_weight").removesuffix(".weight_scale")
        weight = found.get(stem + ".weight")
        if stem != name and weight is not None and weight.dtype in FLOAT8:
            scale = found.pop(name)
            rows = weight.shape[:1]
            if scale.dtype not in DTYPES or scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
                raise CheckpointError(f"{scale.file}: tensor {name} is {scale.dtype} of shape {scale.shape}, expected "
                                      f"one scale for {weight.name}, or one for each of its rows: use another release")
            if weight.scale:
                raise CheckpointError(f"{scale.file}: {weight.name} has two scales, {weight.scale.name} and {name}: "
                                      "use another release")
            found[weight.name] = replace(weight, scale=scale)
    return found


def stored_pieces(entry: TensorEntry, count: int) -> Iterator[Tensor]:
    """The stored numbers on the CPU, flat and in order, at most `count` at a time; each piece overwrites the last.

    Raises CheckpointError for a file that has become shorter since its header was read.
    """
    total = prod(entry.shape)
    room = torch.empty(min(count, total), dtype=_dtype_of(entry))
    with entry.file.open("rb", buffering=0) as opened:
        opened.seek(entry.start)
        for start in range(0, total, count):
            piece = room[: total - start]
            _read_bytes(opened, piece)
            yield piece


def read_into(target: Tensor, entry: TensorEntry) -> None:
    """Fill `target`, contiguous and of any dtype and device, with the stored numbers, multiplied by their scale.

    Numbers that need no conversion are read directly into its memory.
    """
    flat = target.view(-1)
    if entry.scale is None and target.dtype == _dtype_of(entry) and target.device.type == "cpu":
        with entry.file.open("rb", buffering=0) as opened:
            opened.seek(entry.start)
            _read_bytes(opened, flat)
        return
    row = max(1, prod(entry.shape[1:]))
    scale = None if entry.scale is None else read_scale(entry)
    start = 0
    for piece in stored_pieces(entry, max(1, PIECE // row) * row):
        if scale is not None:
            rows = scale[start // row : (start + len(piece)) // row]
            piece = (piece.float().view(-1, row) * rows).view(-1)
        flat[start : start + len(piece)] = piece
        start += len(piece)


def read_scale(entry: TensorEntry) -> Tensor:
    """A float8 tensor's scale in float32, one for each of its rows: (rows, 1)."""
    rows = entry.shape[0] if entry.shape else 1
    return read_tensor(entry.scale, torch.float32).reshape(-1, 1).expand(rows, 1)


def read_tensor(entry: TensorEntry, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU, in the stored dtype where `dtype` is None."""
    target = torch.empty(entry.shape, dtype=dtype or _dtype_of(entry))
    read_into(target, entry)
    return target


def _dtype_of(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.file}: tensor {entry.name} is stored as {entry.dtype}, expected one of "
                              f"{', '.join(DTYPES)}: use another release of the model")
    return DTYPES[entry.dtype]


def _read_bytes(opened: BinaryIO, flat: Tensor) -> None:
    """Read the file's next bytes into `flat`, which is contiguous and on the CPU."""
    room = memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B") if flat.nbytes else b""
    while room:
        got = opened.readinto(room)
        if not got:
            raise CheckpointError(f"{opened.name} has become shorter since it was opened: load it again")
        room = room[got:]
