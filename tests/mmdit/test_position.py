"""Where a token is, against complex numbers in float64, loops by hand and diffusers' own features."""

import itertools
import math

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding

from mmdit.layers import timestep_features
from mmdit.position import crop_table, grid_positions, rope_angles, rotate, sincos_table

AXES, THETA = (8, 12, 12), 10_000
WIDTH = sum(AXES)
# `rotate` computes in float32 (unit round-off 6e-8): the input, cosine, sine, two products and a sum are rounded,
# together at most 4e-7 of the length of a pair. A pair turned by a wrong angle is off by its own length.
TURNED = 1e-6
BFLOAT16 = 2**-8  # unit round-off


def difference(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_positions(n, largest=200, seed=5):
    return torch.randint(largest, (n, 3), generator=torch.Generator().manual_seed(seed)).double()


def turned(x, positions):
    """RoPE as RoFormer's Eq. 12 has it: neighbours are one complex number each, times exp(i · position · θ^(−2j/k))."""
    phases = [
        [p[axis].item() * THETA ** (-2 * j / width) for axis, width in enumerate(AXES) for j in range(width // 2)]
        for p in positions
    ]
    phases = torch.tensor(phases, dtype=torch.float64)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(phases), phases)).flatten(-2)


# ---- rotary angles


def test_rotation_is_multiplication_by_a_complex_number():
    x, positions = draw(2, 3, 7, WIDTH), drawn_positions(7, largest=4096)
    found = rotate(x, rope_angles(positions, AXES, THETA))
    assert difference(found, turned(x, positions)) < TURNED


def test_bfloat16_is_rounded_once_at_the_end():
    x, positions = draw(2, 3, 7, WIDTH).bfloat16(), drawn_positions(7, largest=4096)
    found, wanted = rotate(x, rope_angles(positions, AXES, THETA)), turned(x, positions)
    assert found.dtype == torch.bfloat16
    # Angles of 4096 kept in bfloat16 would be off by whole turns; rounding the result alone costs half a unit.
    assert (found.double() - wanted).abs().le(BFLOAT16 * wanted.abs() + TURNED * wanted.abs().max()).all()


def test_rotation_keeps_the_length_of_every_pair():
    x = draw(2, 3, 7, WIDTH)
    found = rotate(x, rope_angles(drawn_positions(7), AXES, THETA))
    lengths = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    assert (found.unflatten(-1, (-1, 2)).norm(dim=-1) / lengths - 1).abs().max() < TURNED


def test_position_zero_turns_nothing():
    x = draw(1, 2, 3, WIDTH).float()
    assert torch.equal(rotate(x, rope_angles(torch.zeros(3, 3, dtype=torch.float64), AXES, THETA)), x)


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 17), (1, 40, 90)])
def test_scores_depend_on_the_difference_of_positions_alone(shift):
    q, k, positions = draw(1, 2, 6, WIDTH), draw(1, 2, 6, WIDTH, seed=1), drawn_positions(6)

    def scores(offset_q, offset_k):
        turned_q = rotate(q, rope_angles(positions + torch.tensor(offset_q).double(), AXES, THETA))
        return turned_q @ rotate(k, rope_angles(positions + torch.tensor(offset_k).double(), AXES, THETA)).mT

    here = scores((0, 0, 0), (0, 0, 0))
    assert difference(scores(shift, shift), here) < TURNED
    assert difference(scores(shift, (0, 0, 0)), here) > 0.1


# ---- grids


@pytest.mark.parametrize(("index", "rows", "columns"), [(0, 1, 1), (0, 3, 5), (1, 4, 2)])
def test_patches_are_numbered_row_by_row(index, rows, columns):
    by_hand = [[float(index), float(r), float(c)] for r in range(rows) for c in range(columns)]
    assert grid_positions(index, rows, columns).tolist() == by_hand


# ---- timestep features


def test_timestep_features_are_diffusers():
    timestep = torch.tensor([0.0, 0.001, 0.2517, 0.5, 1.0])
    wanted = get_timestep_embedding(1000 * timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    # Frequencies agree to 2 units of float32 (1.2e-7); an angle of up to 1000 makes that 1.2e-4 at most.
    assert (timestep_features(timestep) - wanted).abs().max() < 2e-4


def test_timestep_features_in_closed_form():
    timestep = [0.0, 0.003, 0.37, 1.0]
    wanted = [
        [f(1000 * t * 10_000 ** (-i / 6)) for f in (math.cos, math.sin) for i in range(6)] for t in timestep
    ]
    found = timestep_features(torch.tensor(timestep), width=12)
    assert found.dtype == torch.float32
    assert (found - torch.tensor(wanted)).abs().max() < 2e-4  # float32 angles of up to 1000: 1000 · 2 · 6e-8


def test_bfloat16_timesteps_are_counted_in_float32():
    timestep = torch.tensor([0.25, 0.7109375], dtype=torch.bfloat16)  # 710.9375 is no bfloat16 number: the next is 712
    assert torch.equal(timestep_features(timestep), timestep_features(timestep.float()))


# ---- the table of SD3


@pytest.mark.parametrize(("size", "width"), [(5, 16), (12, 64)])
def test_the_table_starts_as_diffusers_does(size, width):
    wanted = get_2d_sincos_pos_embed(width, size, base_size=size)  # base_size = size: one unit a patch
    assert (sincos_table(size, width)[0] - wanted).abs().max() < 1e-5  # float32 angles of up to 12: 12 · 2 · 6e-8


SIDES = list(itertools.product((1, 2, 3, 6, 7), repeat=2))


@pytest.mark.parametrize("size", [7, 8])
def test_the_crop_is_the_middle_of_the_table(size):
    table = torch.arange(3 * size * size).reshape(1, size * size, 3)
    for rows, columns in SIDES:
        top, left = math.floor((size - rows) / 2), math.floor((size - columns) / 2)  # odd margins: the smaller first
        by_hand = [table[0, (top + r) * size + left + c].tolist() for r in range(rows) for c in range(columns)]
        assert crop_table(table, rows, columns)[0].tolist() == by_hand


def test_the_whole_table_is_its_own_crop():
    table = draw(1, 49, 4)
    assert torch.equal(crop_table(table, 7, 7), table)


@pytest.mark.parametrize(("rows", "columns"), [(8, 3), (3, 8), (9, 9)])
def test_a_picture_larger_than_the_table_is_refused(rows, columns):
    with pytest.raises(ValueError, match=rf"{rows} × {columns} patches .* 7 × 7.*smaller"):
        crop_table(torch.zeros(1, 49, 4), rows, columns)
