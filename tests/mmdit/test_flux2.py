"""FLUX.2 in the one MMDiT: shared modulation, SwiGLU, four rotary axes, references, and repulsion in its blocks.

The official velocities are in tests/weights/test_load.py, diffusers' in tests/weights/test_hub.py.
"""

import copy
from dataclasses import replace

import pytest
import torch
from test_float16 import LARGEST, ROUNDING
from test_model import ROPE, TABLE, TOLERANCE, check_that_inputs_matter, difference, draw, model_of, randomize
from test_repulsion_in_model import BY_HAND, attention, block_inputs, heads_of, modulated, pushed_apart

import repulsion.config
from mmdit import MMDiT, MMDiTConfig, trace
from mmdit.blocks import DualBlock, SingleBlock
from mmdit.layers import Modulation
from mmdit.position import rope_angles
from repulsion import Repulsion
from sampler.parts import stream_blocks

KLEIN = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=2, num_single_blocks=2, latent_channels=8,
                    patch_size=1, context_dim=24, pooled_dim=None, mlp_ratio=3.0, rope_axes=(4, 8, 12, 8),
                    rope_theta=2000, bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
DEV = replace(KLEIN, guidance_embedding=True)
SAMPLES, CONTEXT, IMAGE = 3, 5, 12
SIZES = [(3, 4), (5, 2), (1, 3)]  # of references
both_variants = pytest.mark.parametrize("config", [KLEIN, DEV], ids=["klein", "dev"])


def inputs_for(config, references=0):
    inputs = {"latent": draw(SAMPLES, 8, 3, 4, seed=1), "context": draw(SAMPLES, CONTEXT, 24, seed=2),
              "sigma": torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)}
    if config.guidance_embedding:
        inputs["guidance"] = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    if references:
        inputs["reference"] = [draw(SAMPLES, 8, *size, seed=4 + i) for i, size in enumerate(SIZES[:references])]
    return inputs


def group():
    """One prompt, several noises."""
    context = draw(1, CONTEXT, 24, seed=2).expand(SAMPLES, -1, -1)
    return inputs_for(KLEIN) | {"context": context, "sigma": torch.full((SAMPLES,), 0.9, dtype=torch.float64)}


# ---- what the velocity depends on


@both_variants
def test_every_sample_is_computed_alone(config):
    model, inputs = model_of(config), inputs_for(config, references=2)
    together = model(**inputs)
    for i in range(SAMPLES):
        alone = {key: [x[i : i + 1] for x in value] if isinstance(value, list) else value[i : i + 1]
                 for key, value in inputs.items()}
        assert difference(together[i : i + 1], model(**alone)) < TOLERANCE


@both_variants
def test_every_input_matters(config):
    check_that_inputs_matter(model_of(config), inputs_for(config))


def test_text_has_positions():
    model, inputs = model_of(KLEIN), inputs_for(KLEIN)
    shuffled = model(**inputs | {"context": inputs["context"][:, [3, 0, 4, 2, 1]]})
    assert difference(shuffled, model(**inputs)) > 1e-3


@pytest.mark.parametrize(("config", "step"), [(KLEIN, 10), (ROPE, 1)], ids=["FLUX.2", "FLUX.1"])
def test_each_token_is_where_it_belongs(config, step):
    """The text on the last of four axes, pictures on the others, references 10, 20, … or 1, 2, … on the first."""
    model, p = MMDiT(config), config.patch_size
    pictures = [torch.ones(2, config.latent_channels, p * rows, p * columns) for rows, columns in [(3, 4), *SIZES]]
    positions = [[0.0, 0, 0, i] for i in range(CONTEXT)]
    for r, (rows, columns) in enumerate([(3, 4), *SIZES]):
        positions += [[step * r, y, x, 0] for y in range(rows) for x in range(columns)]
    positions = torch.tensor(positions, dtype=torch.float64)
    if config is ROPE:
        positions[:, 3] = 0
    angles = rope_angles(positions[:, : len(config.rope_axes)], config.rope_axes, config.rope_theta)
    assert torch.equal(model.rope(CONTEXT, pictures, torch.float64), torch.stack([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("config", [KLEIN, ROPE], ids=["FLUX.2", "FLUX.1"])
def test_references_are_read_in_their_order_and_not_painted(config):
    model = model_of(config)
    inputs = inputs_for(KLEIN) | ({} if config is KLEIN else {
        "latent": draw(SAMPLES, 4, 6, 8, seed=1), "pooled": draw(SAMPLES, 20, seed=3)})
    a, b = (draw(SAMPLES, config.latent_channels, *size, seed=4) for size in ((6, 8), (10, 4)))
    found = [model(**inputs, reference=given) for given in (None, a, [a, b], [b, a])]
    for i, velocity in enumerate(found):
        assert velocity.shape == inputs["latent"].shape
        assert all(difference(velocity, other) > 1e-3 for other in found[:i])
    assert torch.equal(model(**inputs, reference=[a]), found[1])  # a list of one is the one
    assert torch.equal(model(**inputs, reference=[]), found[0])


# ---- blocks, and the modulation that they share


def test_one_modulation_of_each_kind_serves_all_blocks():
    model, calls = model_of(KLEIN), []
    layers = [name for name, module in model.named_modules() if isinstance(module, Modulation)]
    assert layers == [*(f"shared_modulation.{kind}" for kind in ("context", "image", "single")), "final_modulation"]
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(**inputs_for(KLEIN))
    assert calls == layers


def own_and_shared(block, *kinds):
    """The same block with modulations of its own, and sharing them; and what the model would give the second."""
    torch.manual_seed(0)
    own = randomize(block(replace(KLEIN, shared_modulation=False))).double()
    shared = block(KLEIN).double().requires_grad_(False)  # attention takes another path where a gradient is needed
    modulations = {kind: own.get_submodule(place) for kind, place in kinds}
    shared.load_state_dict({name: x for name, x in own.state_dict().items() if "modulation" not in name})
    return own, shared, lambda vector: {kind: layer(vector) for kind, layer in modulations.items()}


def dual_blocks():
    return own_and_shared(lambda config: DualBlock(config, 0), ("context", "context.modulation"),
                          ("image", "image.modulation"))


def single_blocks():
    return own_and_shared(SingleBlock, ("single", "modulation"))


def test_a_block_does_the_same_whose_ever_its_modulation_is():
    context, image, vector = block_inputs()
    own, shared, given = dual_blocks()
    for found, wanted in zip(shared(context, image, given(vector)), own(context, image, vector), strict=True):
        assert torch.equal(found, wanted)
    own, shared, given = single_blocks()
    assert torch.equal(shared(image, given(vector)), own(image, vector))


def gated(x):
    first, second = x.chunk(2, dim=-1)
    return first / (1 + (-first).exp()) * second


both_lengths = pytest.mark.parametrize(
    "push", [Repulsion(scale=200.0, iterations=10), Repulsion(strength=0.5, iterations=10)], ids=["scale", "strength"])


@both_lengths
def test_a_dual_stream_block_by_hand(push):
    _, block, given = dual_blocks()
    context, image, vector = block_inputs()
    parts = {name: [x for triple in triples for x in triple] for name, triples in given(vector).items()}
    split = []
    for name, x in (("context", context), ("image", image)):
        into = getattr(block.attention, name)
        split.append(heads_of(into.qkv(modulated(x, *parts[name][:2])), into.norm_q, into.norm_k))
    joint = attention(*(torch.cat(both, dim=2) for both in zip(*split, strict=True)))
    wanted = []
    for name, x, half in (("context", context, joint[:, :CONTEXT]), ("image", image, joint[:, CONTEXT:])):
        attended = getattr(block.attention, name).out(half)
        attended = pushed_apart(attended, push) if name == "context" else attended
        x, own = x + parts[name][2] * attended, getattr(block, name).mlp
        inside = own.in_layer(modulated(x, *parts[name][3:5]))
        wanted.append(x + parts[name][5] * own.out_layer(gated(inside)))
    found = block(context, image, given(vector), None, push.bind(0, 1))
    assert difference(found[0], wanted[0]) < BY_HAND and difference(found[1], wanted[1]) < BY_HAND


@both_lengths
def test_a_single_stream_block_by_hand(push):
    _, block, given = single_blocks()
    context, image, vector = block_inputs()
    tokens = torch.cat([context, image], dim=1)
    ((shift, scale, gate),) = given(vector)["single"]
    joint = block.linear_in(modulated(tokens, shift, scale))
    attended = pushed_apart(attention(*heads_of(joint[..., :192], block.norm_q, block.norm_k)), push)
    wanted = tokens + gate * block.linear_out(torch.cat([attended, gated(joint[..., 192:])], dim=-1))
    assert difference(block(tokens, given(vector), None, push.bind(0, 1, num_context=CONTEXT)), wanted) < BY_HAND


# ---- repulsion in the whole model


@both_lengths
@pytest.mark.parametrize("blocks", [(0, 1), (2, 3), "all"], ids=["dual", "single", "all"])
def test_the_repelled_velocity_is_that_of_autograd_in_float64(push, blocks):
    model, inputs, push = model_of(KLEIN), group(), replace(push, blocks=blocks)
    typical, wanted = model(**inputs), model(**inputs, repulsion=replace(push, solver="autograd"))
    assert difference(wanted, typical) > 1e-2
    assert difference(model(**inputs, repulsion=push), wanted) < 1e-13
    found = model.float()(**{name: x.float() for name, x in inputs.items()}, repulsion=push)
    assert difference(found.double(), wanted) < 1e-5  # float32 against float64, the Gram solver against autograd


@pytest.mark.parametrize(("tokens", "single"), [("all", CONTEXT + IMAGE + 22), ("context", CONTEXT), ("none", None)])
def test_context_repels_in_dual_blocks_and_all_tokens_in_single_ones(monkeypatch, tokens, single):
    counts, repel = [], repulsion.config.repel

    def recorder(x, **settings):
        repelled = repel(x, **settings)
        counts.append((x != repelled).any(-1)[0].sum().item())
        return repelled

    monkeypatch.setattr(repulsion.config, "repel", recorder)
    push = Repulsion(strength=0.5, single_stream_tokens=tokens)
    model_of(KLEIN)(**group(), reference=inputs_for(KLEIN, 2)["reference"], repulsion=push)
    assert counts == [CONTEXT, CONTEXT] + [single] * (2 if single else 0)


def test_no_repulsion_and_strength_zero_are_the_same_bits():
    model, inputs = model_of(KLEIN), group()
    assert torch.equal(model(**inputs, repulsion=Repulsion(strength=0.0)), model(**inputs))
    assert torch.equal(model(**inputs, repulsion=Repulsion(strength=1.0), groups=SAMPLES), model(**inputs))


# ---- dtypes, traces, streamed blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_stay_close_to_float64(dtype):
    model, inputs = model_of(KLEIN), inputs_for(KLEIN, references=1)
    found = copy.deepcopy(model).to(dtype)(**inputs)
    assert found.dtype == dtype
    # as for FLUX.1 in test_model.py and test_float16.py
    assert difference(found.double(), model(**inputs)) < (0.03 if dtype == torch.bfloat16 else ROUNDING)


def test_float16_streams_end_at_the_range():
    model, streams = model_of(KLEIN).float(), []
    for block in model.dual_blocks:
        block.image.mlp.out_layer.weight.mul_(1e5)
    for block in (*model.dual_blocks, *model.single_blocks):
        block.register_forward_hook(lambda _, args, out: streams.append(out[1] if isinstance(out, tuple) else out))
    inputs = {name: x.float() for name, x in inputs_for(KLEIN).items()}
    model(**inputs)
    assert streams[1].abs().max() > LARGEST
    streams.clear()
    model.half()(**inputs)
    assert streams[1].abs().max() == LARGEST and all(stream.isfinite().all() for stream in streams)


def test_a_trace_has_the_shared_modulations_and_the_push():
    model, inputs = model_of(KLEIN), group()
    wanted = model(**inputs, repulsion=Repulsion(strength=0.5))
    with trace(model) as passes:
        assert torch.equal(model(**inputs, repulsion=Repulsion(strength=0.5)), wanted)
    for name in ("shared_modulation.image.mlp_gate.out", "shared_modulation.single.gate.out", "dual.0.repulsion.out",
                 "single.1.repulsion.in", "dual.0.context.mlp.activation.out"):
        assert name in passes[0]


def test_blocks_that_are_copied_one_by_one_compute_the_same():
    model, inputs = model_of(DEV), inputs_for(DEV, references=1)
    wanted = model(**inputs, repulsion=Repulsion(strength=0.5))
    assert torch.equal(stream_blocks(model, torch.device("cpu"))(**inputs, repulsion=Repulsion(strength=0.5)), wanted)


# ---- bad input


@pytest.mark.parametrize(("change", "message"), [
    ({"num_single_blocks": 0}, "shared_modulation needs single-stream blocks, and no dual_attention_blocks"),
    ({"dual_attention_blocks": (0,)}, "shared_modulation needs single-stream blocks"),
    ({"rope_axes": (4, 8, 12, 6)}, r"three or four even numbers .* 32, got \(4, 8, 12, 6\)"),
    ({"rope_axes": (4, 8, 12, 4, 4)}, "three or four"), ({"reference_step": 0}, "reference_step must be at least 1"),
    ({"pooled_dim": 0}, "pooled_dim must be at least 1, got 0"),
])
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(KLEIN, **change)


@pytest.mark.parametrize(("config", "change", "message"), [
    (KLEIN, {"pooled": torch.ones(SAMPLES, 20)}, "reads no pooled text vector: leave pooled out"),
    (ROPE, {"latent": torch.ones(SAMPLES, 4, 6, 8)}, r"reads a pooled text vector: pass pooled \(B, pooled_dim\)"),
    (KLEIN, {"guidance": torch.ones(SAMPLES)}, "no guidance embedding"), (DEV, {}, "pass guidance"),
    (KLEIN, {"reference": [torch.ones(SAMPLES, 8, 2, 2), torch.ones(SAMPLES, 4, 2, 2)]},
     r"reference must be \(B, 8, H, W\), got \(3, 4, 2, 2\)"),
    (TABLE, {"latent": torch.ones(SAMPLES, 4, 6, 8), "pooled": torch.ones(SAMPLES, 20),
             "reference": [torch.ones(SAMPLES, 4, 6, 8)]}, "this model has a table"),
])
def test_a_call_that_does_not_fit_is_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        model_of(config)(**inputs_for(KLEIN) | change)
