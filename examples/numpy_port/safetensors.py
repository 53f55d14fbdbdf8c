"""The format of the weights: the header's length in 8 bytes, the header in JSON, then one tensor after the other."""

import json
from pathlib import Path

import numpy as np

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}


def read(file: Path) -> dict[str, np.ndarray]:
    """Every tensor by its name in the file. Raises ValueError for a file that is not whole, or has another dtype."""
    data, tensors = file.read_bytes(), {}
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__":
                shape, first = about["shape"], start + about["data_offsets"][0]
                numbers = np.frombuffer(data, STORED[about["dtype"]], np.prod(shape, dtype=int), first)
                if about["dtype"] == "BF16":  # the upper half of a float32
                    numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
                tensors[name] = numbers.reshape(shape)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is not a whole safetensors file of {', '.join(STORED)}: {error}") from error
    return tensors
