"""Positions and noise levels, against complex numbers in float64, loops by hand and diffusers' own features."""

import itertools
import math

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from test_model import GUIDED, ROPE, TABLE, inputs_for, model_of

from mmdit import MMDiT
from mmdit.layers import timestep_features
from mmdit.position import crop_table, grid_positions, rope_angles, rotate, sincos_table

AXES, THETA = (8, 12, 12), 10_000
WIDTH = sum(AXES)
# In float32 (unit round-off 6e-8) the input, cosine, sine, two products and a sum are rounded, together at most 4e-7
# of the length of a pair; in float64 the angles of up to 4096 round by 4096 · 1e-16. A pair turned by a wrong angle is
# off by its own length.
TURNED = {torch.float32: 1e-6, torch.float64: 2e-12}
both_widths = pytest.mark.parametrize("wide", list(TURNED), ids=["float32", "float64"])
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


def rope_of(positions, wide):
    angles = rope_angles(positions, AXES, THETA)
    return torch.stack([angles.cos(), angles.sin()]).to(wide)


# ---- rotation


@both_widths
def test_rotation_is_multiplication_by_a_complex_number(wide):
    x, positions = draw(2, 3, 7, WIDTH), drawn_positions(7, largest=4096)
    found = rotate(x, rope_of(positions, wide))
    assert difference(found, turned(x, positions)) < TURNED[wide]


def test_bfloat16_is_rounded_once_at_the_end():
    x, positions = draw(2, 3, 7, WIDTH).bfloat16(), drawn_positions(7, largest=4096)
    found, wanted = rotate(x, rope_of(positions, torch.float32)), turned(x, positions)
    assert found.dtype == torch.bfloat16
    # Angles of 4096 kept in bfloat16 would be off by whole turns; rounding the result alone costs half a unit.
    rounding = TURNED[torch.float32] * wanted.abs().max()
    assert (found.double() - wanted).abs().le(BFLOAT16 * wanted.abs() + rounding).all()


@both_widths
def test_rotation_keeps_the_length_of_every_pair(wide):
    x = draw(2, 3, 7, WIDTH)
    found = rotate(x, rope_of(drawn_positions(7), wide))
    lengths = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    assert (found.unflatten(-1, (-1, 2)).norm(dim=-1) / lengths - 1).abs().max() < TURNED[wide]


@both_widths
def test_position_zero_turns_nothing(wide):
    x = draw(1, 2, 3, WIDTH).float()
    assert torch.equal(rotate(x, rope_of(torch.zeros(3, 3, dtype=torch.float64), wide)), x)


@both_widths
@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 17), (1, 40, 90)])
def test_scores_depend_on_the_difference_of_positions_alone(shift, wide):
    q, k, positions = draw(1, 2, 6, WIDTH), draw(1, 2, 6, WIDTH, seed=1), drawn_positions(6)

    def scores(offset_q, offset_k):
        turned_q = rotate(q, rope_of(positions + torch.tensor(offset_q).double(), wide))
        return turned_q @ rotate(k, rope_of(positions + torch.tensor(offset_k).double(), wide)).mT

    here = scores((0, 0, 0), (0, 0, 0))
    assert difference(scores(shift, shift), here) < TURNED[wide]
    assert difference(scores(shift, (0, 0, 0)), here) > 0.1


# ---- cosine and sine of every token, once for a forward pass

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = {"image": [(6, 8)], "image and reference": [(6, 8), (10, 4)]}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@every_size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_is_cosine_and_sine_of_the_float64_angles_to_the_bit(sizes, dtype):
    model, pictures = MMDiT(ROPE), [torch.ones(2, 4, *size) for size in sizes]
    positions = [[0.0, 0.0, 0.0]] * 5  # of the context
    for index, (height, width) in enumerate(sizes):
        positions += [[float(index), float(r), float(c)] for r in range(height // 2) for c in range(width // 2)]
    angles = rope_angles(torch.tensor(positions, dtype=torch.float64), ROPE.rope_axes, ROPE.rope_theta)
    rope, wide = model.rope(5, pictures, dtype), torch.promote_types(dtype, torch.float32)
    assert rope.dtype == wide and rope.shape == (2, len(positions), ROPE.head_dim // 2)
    assert torch.equal(rope[0], angles.cos().to(wide)) and torch.equal(rope[1], angles.sin().to(wide))


@every_size
def test_rope_is_computed_once_for_a_forward_pass_and_given_to_every_block(sizes, monkeypatch):
    computed, given, rope = [], [], MMDiT.rope
    monkeypatch.setattr(MMDiT, "rope", lambda *arguments: computed.append(rope(*arguments)) or computed[-1])
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    for block, place in [*((block, 3) for block in model.dual_blocks), *((block, 2) for block in model.single_blocks)]:
        block.register_forward_pre_hook(lambda _, args, place=place: given.append(args[place]))
    model(**inputs, **({"reference": draw(3, 4, *sizes[1])} if len(sizes) > 1 else {}))
    assert len(computed) == 1
    assert len(given) == ROPE.num_blocks and all(tensor is computed[0] for tensor in given)


def test_a_model_with_a_table_computes_no_rope(monkeypatch):
    monkeypatch.delattr(MMDiT, "rope")
    model_of(TABLE)(**inputs_for(TABLE))


@every_size
def test_the_default_device_does_not_matter_to_rope(sizes):
    model, pictures = MMDiT(ROPE), [torch.ones(2, 4, *size) for size in sizes]
    wanted = model.rope(5, pictures, torch.bfloat16)
    with torch.device("meta"):
        assert torch.equal(model.rope(5, pictures, torch.bfloat16), wanted)
        nowhere = model.rope(5, [picture.to("meta") for picture in pictures], torch.bfloat16)
    assert (nowhere.device.type, nowhere.shape, nowhere.dtype) == ("meta", wanted.shape, wanted.dtype)


@pytest.mark.parametrize("config", [ROPE, GUIDED, TABLE], ids=["rope", "guided", "table"])
def test_a_forward_pass_under_the_meta_device(config):
    model, inputs = model_of(config), inputs_for(config)
    wanted = model(**inputs)
    with torch.device("meta"):
        assert torch.equal(model(**inputs), wanted)  # everything it makes is where its inputs are
        shapes = {name: tensor.to("meta") for name, tensor in inputs.items()}
        assert MMDiT(config).double()(**shapes).shape == wanted.shape


# ---- grids


@pytest.mark.parametrize(("index", "rows", "columns"), [(0, 1, 1), (0, 3, 5), (1, 4, 2)])
def test_patches_are_numbered_row_by_row(index, rows, columns):
    by_hand = [[float(index), float(r), float(c)] for r in range(rows) for c in range(columns)]
    assert grid_positions(index, rows, columns).tolist() == by_hand


# ---- timestep features


def test_timestep_features_are_diffusers():
    sigma = torch.tensor([0.0, 0.001, 0.2517, 0.5, 1.0])
    wanted = get_timestep_embedding(1000 * sigma, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    # Frequencies agree to 2 units of float32 (1.2e-7); an angle of up to 1000 makes that 1.2e-4 at most.
    assert (timestep_features(sigma) - wanted).abs().max() < 2e-4


def test_timestep_features_in_closed_form():
    sigma = [0.0, 0.003, 0.37, 1.0]
    wanted = [[f(1000 * s * 10_000 ** (-i / 6)) for f in (math.cos, math.sin) for i in range(6)] for s in sigma]
    found = timestep_features(torch.tensor(sigma), width=12)
    assert found.dtype == torch.float32
    assert (found - torch.tensor(wanted)).abs().max() < 2e-4  # float32 angles of up to 1000: 1000 · 2 · 6e-8


def test_bfloat16_noise_levels_are_counted_in_float32():
    sigma = torch.tensor([0.25, 0.7109375], dtype=torch.bfloat16)  # 710.9375 is no bfloat16 number: the next is 712
    assert torch.equal(timestep_features(sigma), timestep_features(sigma.float()))


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
