"""Tensors by name, integers among them, in .safetensors and .npz files."""

import ast
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from weights.files import DTYPES as REAL
from weights.files import read_header
from weights.writing import write_safetensors

DTYPES = REAL | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                 "BOOL": torch.bool}
NUMPY = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8",
         "b1": "BOOL"}


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file."""
    write_safetensors(file, tensors, {dtype: word for word, dtype in DTYPES.items()})


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or .npz file. Raises FileNotFoundError, or ValueError for what cannot be read."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file: give a .safetensors or .npz file")
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                return {name.removesuffix(".npy"): read_npy(archive.read(name)) for name in archive.namelist()}
        except (zipfile.BadZipFile, zlib.error, KeyError, SyntaxError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file} is no .npz file that can be read ({error}): write it with numpy.savez, little-"
                             "endian numbers") from error
    found = {}
    with file.open("rb") as opened:
        for name, entry in read_header(file).items():
            if entry.dtype not in DTYPES:
                raise ValueError(f"{file}: tensor {name} is {entry.dtype}, expected one of {', '.join(DTYPES)}")
            opened.seek(entry.start)
            found[name] = tensor_of(opened.read(entry.nbytes), entry.dtype, entry.shape)
    return found


def read_npy(content: bytes) -> Tensor:
    """One array of numpy's: a magic word, a version, the header's length, the header as a Python dict, the numbers."""
    if not content.startswith(b"\x93NUMPY"):
        raise ValueError("it holds something else than arrays")
    start = 10 if content[6] == 1 else 12
    end = start + int.from_bytes(content[8:start], "little")
    about = ast.literal_eval(content[start:end].decode("latin-1"))
    dtype, shape = NUMPY[about["descr"].lstrip("<|")], about["shape"]
    if about["fortran_order"]:
        return tensor_of(content[end:], dtype, shape[::-1]).permute(*range(len(shape))[::-1])
    return tensor_of(content[end:], dtype, shape)


def tensor_of(content: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if not content:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)
