"""`Repulsion`: its checks, and which tokens of which block its push reaches."""

import dataclasses

import pytest
import torch

from repulsion import Repulsion, repel


def test_settings_cannot_be_changed_in_passing():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Repulsion(1.0).strength = 2.0


@pytest.mark.parametrize("field,value", [
    ("scale", -1.0), ("iterations", 0), ("steps", -1), ("start", -1), ("blocks", "some"), ("blocks", (-1,)),
    ("single_stream_tokens", "image"), ("branches", "both"), ("objective", "x"), ("kernel_reg", -1.0), ("solver", "x"),
    ("strength", 1.0), ("steps", 1.5), ("iterations", 2.0), ("blocks", 0), ("until", 1.5), ("until", -0.1),
    ("until", float("nan")),
])  # fmt: skip
def test_every_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        Repulsion(**{"scale": 1.0, field: value})


@pytest.mark.parametrize(("settings", "acting"), [
    ({}, [0]), ({"steps": 3}, [0, 1, 2]), ({"steps": 2, "start": 1}, [1, 2]), ({"steps": 0}, []),
    ({"until": 0.9}, [0, 1, 2]), ({"until": 0.9, "start": 1}, [1, 2]), ({"until": 0.0}, [0, 1, 2, 3]),
    ({"until": 1.0}, [0]),
])
def test_steps_act_by_their_number_or_by_their_noise_level(settings, acting):
    levels = [1.0, 0.97, 0.9, 0.77]
    found = Repulsion(1.0, **settings)
    assert [step for step, sigma in enumerate(levels) if found.acts_at(step, sigma)] == acting


def test_steps_and_a_noise_level_together_are_refused():
    with pytest.raises(ValueError, match="repulsion has until, 0.9, and steps, 2: give one"):
        Repulsion(1.0, steps=2, until=0.9)


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


def test_a_dual_stream_block_pushes_its_context():
    context = batch(3)
    push = Repulsion(scale=5.0, iterations=4).bind(0, 4, groups=2)
    assert torch.equal(push(context), repel(context, 5.0, 4, groups=2))


@pytest.mark.parametrize("blocks,acting", [("all", (0, 1, 2, 3)), ("first", (0, 1)), ((1, 3), (1, 3)), ((), ())])
def test_blocks_that_do_not_repel_have_no_push(blocks, acting):
    pushes = [Repulsion(1.0, blocks=blocks).bind(i, 4) for i in range(4)]
    assert tuple(i for i, push in enumerate(pushes) if push) == acting


def test_the_conditional_branch_is_the_last_group():
    context = batch(3)
    moved = Repulsion(1.0, branches="conditional").bind(0, 4, groups=2)(context)
    assert torch.equal(moved[:2], context[:2])
    assert torch.equal(moved[2:], repel(context[2:], None, 1, strength=1.0))


@pytest.mark.parametrize("tokens,part", [("all", slice(0, None)), ("context", slice(0, 3))])
def test_a_single_stream_block_pushes_its_part_of_the_sequence(tokens, part):
    joint = batch(8)
    original = joint.clone()
    moved = Repulsion(scale=5.0, iterations=4, single_stream_tokens=tokens).bind(0, 4, 2, num_context=3)(joint)
    expected = joint.clone()
    expected[:, part] = repel(joint[:, part], 5.0, 4, groups=2)
    assert torch.equal(moved, expected)
    assert torch.equal(joint, original)


def test_single_stream_blocks_can_be_left_out():
    repulsion = Repulsion(1.0, single_stream_tokens="none")
    assert repulsion.bind(0, 4, num_context=3) is None and repulsion.bind(0, 4) is not None
