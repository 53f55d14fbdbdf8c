"""float16 ends at 65504: what a residual stream does there."""

import pytest
import torch
from test_model import ROPE, TABLE, difference, draw, inputs_for, model_of, randomize

from mmdit.blocks import DualBlock, SingleBlock
from mmdit.layers import clip_float16

LARGEST = torch.finfo(torch.float16).max
UP, DOWN = 3, 7  # the channels that the blocks below push out of the range
# float16 rounds to 2^-11 of a number, and within a block some ten results one after the other, the largest of them
# 65504: compared in the norm of the whole output.
ROUNDING = 0.01


def test_only_float16_is_clipped():
    beyond = torch.tensor([70_000.0, -1e30, torch.inf, -torch.inf, 65504.0, -3.0, 0.0])
    clipped = [LARGEST, -LARGEST, LARGEST, -LARGEST, LARGEST, -3.0, 0.0]
    assert clip_float16(beyond.half()).tolist() == clipped
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tokens = beyond.to(dtype)
        assert clip_float16(tokens) is tokens


def test_nan_is_not_hidden():
    assert clip_float16(torch.tensor([torch.nan, 1.0]).half()).isnan().tolist() == [True, False]


def overflowing(out, modulation, gate, width=64):
    """Sets a residual branch of about ±30000 in two channels: the last linear layer's bias and the gate of 1."""
    with torch.no_grad():
        out.bias[[UP, DOWN]] = torch.tensor([30_000.0, -30_000.0])
        modulation.weight[gate * width : (gate + 1) * width] = 0
        modulation.bias[gate * width : (gate + 1) * width] = 1


def stream(n, seed):
    """Tokens at ±50000 in the two channels: within range as they enter, and beyond it with 30000 more."""
    tokens = draw(2, n, 64, seed=seed).float()
    tokens[..., UP], tokens[..., DOWN] = 50_000, -50_000
    return tokens


def assert_at_the_end_of_the_range(found, wanted):
    """`wanted` is the float32 block's output, which leaves the range in the two channels alone."""
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert (found[..., UP] == LARGEST).all() and (found[..., DOWN] == -LARGEST).all()
    beyond = wanted.abs() > LARGEST
    assert beyond[..., [UP, DOWN]].all() and beyond.sum() == beyond[..., [UP, DOWN]].sum()
    others = [i for i in range(64) if i not in (UP, DOWN)]
    assert difference(found[..., others].float(), wanted[..., others]) < ROUNDING


@pytest.mark.parametrize("config", [ROPE, TABLE], ids=["flux", "second attention"])
def test_both_streams_of_a_dual_stream_block_stay_in_range(config):
    torch.manual_seed(0)
    block = randomize(DualBlock(config, 0))
    for own in (block.context, block.image):
        overflowing(own.mlp.out_layer, own.modulation, gate=5)
    inputs = stream(5, seed=1), stream(12, seed=2), draw(2, 64, seed=3).float()
    wanted = block(*inputs)
    found = block.half()(*(x.half() for x in inputs))
    for a, b in zip(found, wanted, strict=True):
        assert_at_the_end_of_the_range(a, b)


def test_the_image_stays_in_range_where_the_context_ends():
    torch.manual_seed(0)
    block = randomize(DualBlock(TABLE, TABLE.num_dual_blocks - 1))
    overflowing(block.image.mlp.out_layer, block.image.modulation, gate=5)
    inputs = stream(5, seed=1), stream(12, seed=2), draw(2, 64, seed=3).float()
    wanted = block(*inputs)
    found = block.half()(*(x.half() for x in inputs))
    assert wanted[0] is found[0] is None
    assert_at_the_end_of_the_range(found[1], wanted[1])


def test_a_single_stream_block_stays_in_range():
    torch.manual_seed(0)
    block = randomize(SingleBlock(ROPE))
    overflowing(block.linear_out, block.modulation, gate=2)
    tokens, vector = stream(17, seed=1), draw(2, 64, seed=3).float()
    wanted = block(tokens, vector)
    assert_at_the_end_of_the_range(block.half()(tokens.half(), vector.half()), wanted)


@pytest.mark.parametrize("config", [ROPE, TABLE], ids=["rope", "table"])
def test_a_float16_model_whose_streams_leave_the_range_gives_finite_velocities(config):
    model = model_of(config).float()
    for block in model.dual_blocks:
        overflowing(block.image.mlp.out_layer, block.image.modulation, gate=5)
    for block in model.single_blocks:
        overflowing(block.linear_out, block.modulation, gate=2)
    inputs, streams = inputs_for(config, dtype=torch.float32), []
    for block in (*model.dual_blocks, *model.single_blocks):
        block.register_forward_hook(lambda _, args, out: streams.append(out[1] if isinstance(out, tuple) else out))
    model(**inputs)
    assert streams[-1].abs().max() > LARGEST and streams[-1].isfinite().all()
    streams.clear()
    velocity = model.half()(**inputs)
    assert streams[-1].abs().max() == LARGEST
    assert velocity.dtype == torch.float16 and velocity.isfinite().all()


def test_a_float16_model_within_the_range_stays_close_to_float64():
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    wanted = model(**inputs)
    assert difference(model.half()(**inputs).double(), wanted) < ROUNDING
