"""Tensors by name in .safetensors and .npz files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file."""
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, file)


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or .npz file. Raises FileNotFoundError, or ValueError for an unreadable file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file: give a .safetensors or .npz file")
    try:
        if file.suffix != ".npz":
            return load_file(file)
        with np.load(file) as arrays:
            return {name: from_numpy(array) for name, array in arrays.items()}
    except (SafetensorError, zipfile.BadZipFile, zlib.error, AttributeError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): write it with safetensors or numpy.savez, arrays of "
                         "numbers only") from error


def from_numpy(array: np.ndarray) -> Tensor:
    """In the machine's order of bytes; two bytes without a type are bfloat16, which numpy has not and stores so."""
    if array.dtype == "V2":
        return torch.from_numpy(array.view("<i2").astype("i2")).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
