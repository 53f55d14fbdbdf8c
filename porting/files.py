"""Tensors by name in .safetensors and .npz files."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or .npz file. Raises FileNotFoundError, or ValueError for an unreadable file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file: give a .safetensors or .npz file")
    try:
        if file.suffix != ".npz":
            return load_file(file)
        with np.load(file) as arrays:  # in the machine's order of bytes; numpy stores bfloat16 without a type
            return {name: torch.from_numpy(x.view("<i2")).view(torch.bfloat16) if x.dtype == "V2" else
                    torch.from_numpy(x.astype(x.dtype.newbyteorder("="))) for name, x in arrays.items()}
    except (SafetensorError, zipfile.BadZipFile, zlib.error, AttributeError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): write it with safetensors or numpy.savez, arrays of "
                         "numbers only") from error
