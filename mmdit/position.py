"""The positions of tokens: rotary angles (FLUX) or a table that is added (SD3)."""

import torch
from einops import rearrange
from torch import Tensor


def grid_positions(index: int, rows: int, columns: int, axes: int = 3) -> Tensor:
    """(index, row, column) of each patch of a rows × columns grid, row by row: (m, axes) float64 on the CPU.

    The image has index 0; Kontext's reference picture has 1, those of FLUX.2 have 10, 20, … On the fourth of FLUX.2's
    four axes, the text's, every patch is at 0.
    """
    counts = (torch.arange(start, start + size, dtype=torch.float64, device="cpu")
              for start, size in ((index, 1), (0, rows), (0, columns), (0, 1))[:axes])
    return torch.stack(torch.meshgrid(*counts, indexing="ij"), dim=-1).flatten(0, -2)


def text_positions(n: int, axes: int = 3) -> Tensor:
    """The positions of n context tokens: (n, axes) float64 on the CPU, all 0, or 0, 1, 2, … on a fourth axis."""
    positions = torch.zeros(n, axes, dtype=torch.float64, device="cpu")
    positions[:, 3:] = torch.arange(n, dtype=torch.float64, device="cpu")[:, None]
    return positions


def rope_angles(positions: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Rotation angles of every pair of head dimensions: positions (n, axes) → (n, k / 2) float64 (RoFormer, FLUX.1)."""
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(positions[:, axis, None] * frequencies)
    return torch.cat(angles, dim=-1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighboring pairs (x₀, x₁) of a head by their angle: (b, h, n, k), (cos, sin) (2, n, k / 2) → (b, h, n, k).

    Computed in the dtype of `rope`, float32 or wider, and rounded to x's once.
    """
    (cos, sin), (even, odd) = rope, x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def sincos_table(size: int, width: int) -> Tensor:
    """A size × size table of sin/cos positions, columns in the first half of the width, rows in the second:
    (1, size², width). What SD3 starts from; a checkpoint brings its own."""
    if torch.get_default_device().type == "meta":  # names and shapes alone; arithmetic there takes a second to set up
        return torch.empty(1, size * size, width)
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(size)[:, None] * frequencies
    features = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns = features[None, :, :].expand(size, size, -1)
    rows = features[:, None, :].expand(size, size, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "rows columns d -> 1 (rows columns) d")


def crop_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """The middle rows × columns of a square table: (1, S², d) → (1, rows · columns, d) (SD3).

    Raises ValueError where the picture has more patches on a side than the table.
    """
    size = round(table.shape[1] ** 0.5)
    if max(rows, columns) > size:
        raise ValueError(f"latent has {rows} × {columns} patches but the position table ends at {size} × {size}: "
                         "ask for a smaller picture")
    top, left = (size - rows) // 2, (size - columns) // 2
    square = rearrange(table, "one (s t) d -> one s t d", s=size)
    return rearrange(square[:, top : top + rows, left : left + columns], "one s t d -> one (s t) d")
