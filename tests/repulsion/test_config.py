"""`Repulsion`: its checks, the paper's settings, and which block and which tokens it reaches."""

import dataclasses

import pytest
import torch

from repulsion import PRESETS, Repulsion, repel


def test_presets_are_the_settings_table_of_the_paper():
    table = {  # M, τ, and the range of η
        "flux1-dev": (50, 1, 5e6, 8e9), "flux1-kontext-dev": (50, 1, 5e6, 8e9),
        "sd3.5-large": (100, 4, 5e2, 5e6), "sd3.5-large-turbo": (100, 1, 1e5, 1e7),
    }
    assert PRESETS.keys() == table.keys()
    for name, (iterations, steps, low, high) in table.items():
        preset = Repulsion.preset(name)
        assert (preset.iterations, preset.steps) == (iterations, steps)
        assert low <= preset.scale <= high
        assert (preset.tokens, preset.single_stream_tokens, preset.blocks) == ("context", "all", "all")


def test_settings_cannot_be_changed_in_passing():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Repulsion(1.0).scale = 2.0


@pytest.mark.parametrize("field,value", [
    ("scale", -1.0), ("iterations", 0), ("steps", -1), ("start", -1), ("blocks", "some"), ("blocks", (-1,)),
    ("tokens", "all"), ("single_stream_tokens", "image"), ("site", "mlp"), ("branches", "both"),
    ("objective", "x"), ("kernel_reg", -1.0), ("solver", "x"),
])  # fmt: skip
def test_every_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        Repulsion(**{"scale": 1.0, field: value})


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="flux1-dev"):
        Repulsion.preset("sdxl")


@pytest.mark.parametrize("total", [8, 24, 38, 57])
def test_thirds_part_the_blocks_evenly_and_in_order(total):
    parts = {name: [i for i in range(total) if Repulsion(1.0, blocks=name).acts_in(i, total)]
             for name in ("first", "middle", "last")}
    assert parts["first"] + parts["middle"] + parts["last"] == list(range(total))
    assert max(map(len, parts.values())) - min(map(len, parts.values())) <= 1
    chosen = Repulsion(1.0, blocks=[2, 5])
    assert [i for i in range(total) if chosen.acts_in(i, total)] == [2, 5]


def test_blocks_beyond_the_model_are_refused():
    Repulsion(1.0, blocks=(0, 7)).check_blocks(8)
    with pytest.raises(ValueError, match="block 8, but this model's blocks end at 7"):
        Repulsion(1.0, blocks=(0, 8)).check_blocks(8)


def batch(n):
    torch.manual_seed(n)
    return torch.randn(1, n, 8, dtype=torch.float64) + 0.1 * torch.randn(4, n, 8, dtype=torch.float64)


@pytest.mark.parametrize("tokens", ["context", "image"])
@pytest.mark.parametrize("site", ["attention", "block"])
def test_streams_repels_the_named_half_at_the_named_site(tokens, site):
    repulsion = Repulsion(5.0, iterations=4, tokens=tokens, site=site)
    context, image = batch(3), batch(5)
    for here in ("attention", "block"):
        moved = repulsion.streams(here, context, image, groups=1)
        expected = [repel(x, 5.0, 4) if here == site and name == tokens else x
                    for name, x in (("context", context), ("image", image))]
        assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_a_context_that_has_ended_is_left_alone():
    image = batch(5)
    context, same = Repulsion(5.0).streams("attention", None, image, groups=1)
    assert context is None and same is image


@pytest.mark.parametrize("settings,part", [
    ({}, slice(0, None)), ({"single_stream_tokens": "context"}, slice(0, 3)),
    ({"single_stream_tokens": "none"}, slice(0, 0)), ({"tokens": "image"}, slice(3, None)),
])  # fmt: skip
def test_sequence_repels_its_part_of_a_single_stream_block(settings, part):
    joint = batch(8)
    original = joint.clone()
    moved = Repulsion(5.0, iterations=4, **settings).sequence("attention", joint, num_context=3, groups=2)
    expected = joint.clone()
    if part != slice(0, 0):
        expected[:, part] = repel(joint[:, part], 5.0, 4, groups=2)
    assert torch.equal(moved, expected)
    assert torch.equal(joint, original)
