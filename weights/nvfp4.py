"""NVFP4: matrices of 4-bit numbers with a float8 scale a block of 16 columns and one scale for all, made wide again."""

import torch
from einops import rearrange
from torch import Tensor

BLOCK, TILE = 16, (128, 4)  # columns that share a scale; rows and columns of a tile of scales
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers by their last three bits; the first bit is the sign


def scales_shape(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales of a matrix: one for each row and block, padded to whole tiles."""
    return tuple(-(-count // tile) * tile for count, tile in zip((rows, columns // BLOCK), TILE, strict=True))


def widen(packed: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """Two numbers a byte (rows, columns / 2) uint8, the first in the high bits; scales in tiles, float8; scale () →
    (rows, columns) float32.

    In a tile, row r of the matrix lies at (r mod 32, r div 32), as NVIDIA's kernels read it.
    """
    rows, columns = len(packed), 2 * packed.shape[1]
    scales = rearrange(scales.float().flatten(), "(tile column high low c) -> (tile low high) (column c)",
                       column=scales.shape[1] // TILE[1], high=32, low=4, c=TILE[1])[:rows, : columns // BLOCK]
    by_code = torch.tensor([*E2M1, *(-number for number in E2M1)])
    numbers = torch.cartesian_prod(by_code, by_code)[packed.int()].flatten(1)  # two a byte
    return (rearrange(numbers, "r (b k) -> r b k", k=BLOCK) * (scales * scale.float())[:, :, None]).flatten(1)
