"""`trace`: its tensors against the same by hand; it changes no result and leaves no hook."""

import pytest
import torch
from einops import rearrange
from test_model import ROPE, TABLE, difference, draw, inputs_for, model_of, randomize
from test_repulsion_in_model import (
    BY_HAND,
    PUSH,
    attention,
    dual_block_by_hand,
    gelu,
    group,
    heads_of,
    modulated,
    modulation,
    pushed_apart,
)

from mmdit import Autoencoder, AutoencoderConfig, ClipConfig, ClipTextEncoder, T5Config, T5Encoder, trace
from mmdit.layers import Modulation
from repulsion import Repulsion
from sampler.parts import compile_blocks, stream_blocks

both_families = pytest.mark.parametrize("config", [ROPE, TABLE], ids=["rope", "table"])
CLIP = ClipConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, max_positions=10,
                  end_token=49, projection_dim=16)
T5 = T5Config(vocab_size=50, hidden_size=32, head_dim=12, intermediate_size=48, num_layers=2, num_heads=4)
IMAGES = AutoencoderConfig(channels=(8, 16), latent_channels=4, blocks_per_level=1, norm_groups=4)


def network(kind, config):
    torch.manual_seed(0)
    return randomize(kind(config)).double()


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [hook for module in model.modules() for name in names for hook in getattr(module, name)]


# ---- its tensors are those of the pass


def test_a_dual_stream_block_is_recorded_as_by_hand():
    model, push = model_of(TABLE), PUSH
    with trace(model) as passes:
        model(**group(), repulsion=push)
    (seen,) = passes
    block, vector = model.dual_blocks[0], seen["dual.0.vector.in"]
    streams = {name: seen[f"dual.0.{name}.in"] for name in ("context", "image")}
    q, k, v = [], [], []
    for name, x in streams.items():
        into, count = getattr(block.attention, name), 9 if name == "image" else 6
        parts = modulation(getattr(block, name).modulation, vector, count)
        for part, wanted in zip(("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate", "second_shift",
                                 "second_scale", "second_gate"), parts, strict=False):
            assert difference(seen[f"dual.0.{name}.modulation.{part}.out"], wanted) < BY_HAND
        into_attention = modulated(x, *parts[:2])
        assert difference(seen[f"dual.0.attention.{name}.in"], into_attention) < BY_HAND
        for whole, half in zip((q, k, v), heads_of(into.qkv(into_attention), into.norm_q, into.norm_k), strict=True):
            whole.append(half)
    q, k, v = (torch.cat(both, dim=2) for both in (q, k, v))
    for name, wanted in (("q", q), ("k", k), ("v", v)):
        assert difference(seen[f"dual.0.attention.{name}"], wanted) < BY_HAND
    joined = rearrange(seen["dual.0.attention.attended"], "b h n k -> b n (h k)")
    assert difference(joined, attention(q, k, v)) < BY_HAND
    for name, wanted in zip(streams, dual_block_by_hand(block, streams, vector, push), strict=True):
        assert difference(seen[f"dual.0.{name}.out"], wanted) < BY_HAND
    assert difference(seen["dual.0.repulsion.out"], pushed_apart(seen["dual.0.repulsion.in"], push)) < BY_HAND
    assert torch.equal(seen["dual.0.repulsion.out"], seen["dual.0.attention.context.out"])
    assert "dual.2.repulsion.in" not in seen  # its context output is unused


def test_a_single_stream_block_is_recorded_as_by_hand():
    model = model_of(ROPE)
    with trace(model) as passes:
        model(**group(), repulsion=PUSH)
    (seen,) = passes
    block, n = model.single_blocks[1], seen["context.in"].shape[1]
    shift, scale, gate = modulation(block.modulation, seen["single.1.vector.in"], 3)
    joint = block.linear_in(modulated(seen["single.1.tokens.in"], shift, scale))
    q, k, v = heads_of(joint[..., :192], block.norm_q, block.norm_k)
    # a pair of neighbors is a complex number, multiplied by cos + i sin of its angle
    cos, sin = rope = seen["dual.0.rope.in"]
    rows = torch.tensor([0.0, 1, 2]).repeat_interleave(4).double()
    assert torch.equal(rope[:, n:, 4], torch.stack([rows.cos(), rows.sin()]))  # the second axis's first frequency is 1
    assert (cos[:n] == 1).all() and not sin[:n].any()  # the context has position 0
    q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
                               * torch.complex(cos, sin)).flatten(-2) for x in (q, k))
    for name, wanted in (("q", q), ("k", k)):
        assert difference(seen[f"single.1.attention.{name}"], wanted) < BY_HAND
    attended = attention(*(seen[f"single.1.attention.{name}"] for name in "qkv"))
    assert difference(seen["single.1.repulsion.in"], attended) < BY_HAND
    pushed = pushed_apart(seen["single.1.repulsion.in"], PUSH)
    assert difference(seen["single.1.repulsion.out"], pushed) < BY_HAND
    out = seen["single.1.tokens.in"] + gate * block.linear_out(torch.cat([pushed, gelu(joint[..., 192:])], dim=-1))
    assert difference(seen["single.1.tokens.out"], out) < BY_HAND


def test_text_encoders_and_autoencoder_are_recorded_too():
    clip, t5, images = network(ClipTextEncoder, CLIP), network(T5Encoder, T5), network(Autoencoder, IMAGES)
    ids = torch.tensor([[1, 7, 9, 49, 49], [1, 3, 49, 49, 49]])
    picture = draw(1, 3, 8, 8, seed=0)
    with trace(clip) as of_clip, trace(t5) as of_t5, trace(images) as of_images:
        encoded, states = clip(ids), t5(ids)
        decoded = images.decode(images.encode(picture))
    (seen,) = of_clip
    assert torch.equal(seen["in"], ids)
    for name, value in encoded._asdict().items():
        assert torch.equal(seen[f"{name}.out"], value)
    scores = seen["layers.1.attention.q"] @ seen["layers.1.attention.k"].mT / 8**0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    assert difference(seen["layers.1.attention.attended"], scores.softmax(-1) @ seen["layers.1.attention.v"]) < BY_HAND
    (seen,) = of_t5
    assert torch.equal(seen["out"], states)
    scores = seen["layers.0.attention.q"] @ seen["layers.0.attention.k"].mT + seen["layers.0.bias.in"]
    assert difference(seen["layers.0.attention.attended"], scores.softmax(-1) @ seen["layers.0.attention.v"]) < BY_HAND
    encoder, decoder = of_images
    assert torch.equal(encoder["encoder.in"], picture) and torch.equal(decoder["decoder.out"], decoded)
    normed = rearrange(decoder["decoder.middle.attention.norm.out"], "b c y x -> b 1 (y x) c")
    q, k, v = images.decoder.middle.attention.qkv(normed).chunk(3, dim=-1)
    for name, wanted in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(decoder[f"decoder.middle.attention.{name}"], wanted)


# ---- it changes no result and leaves no hook


@both_families
@pytest.mark.parametrize("push", [None, PUSH], ids=["plain", "repelled"])
def test_the_velocity_is_the_same_to_the_bit(config, push):
    model, inputs = model_of(config), group()
    wanted = model(**inputs, repulsion=push)
    with trace(model) as passes:
        found = model(**inputs, repulsion=push)
    assert torch.equal(found, wanted) and torch.equal(passes[0]["velocity.out"], wanted)


@both_families
def test_nothing_is_hooked_before_and_after_and_nothing_recorded_outside(config):
    model, inputs = model_of(config), inputs_for(config)
    assert not hooks_of(model)
    with trace(model) as passes:
        assert hooks_of(model)
        model(**inputs)
    assert not hooks_of(model)
    seen = dict(passes[0])
    model(**inputs)
    assert len(passes) == 1 and passes[0].keys() == seen.keys()
    assert all(passes[0][name] is tensor for name, tensor in seen.items())


def test_an_exception_leaves_nothing_behind_either():
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    with pytest.raises(ZeroDivisionError), trace(model) as passes:
        model(**inputs)
        raise ZeroDivisionError
    assert not hooks_of(model) and len(passes) == 1
    with trace(model) as passes:
        with pytest.raises(ValueError, match="must be multiples of the patch size"):
            model(**inputs | {"latent": inputs["latent"][..., 1:]})
        with pytest.raises(RuntimeError):  # inside the second block
            model.dual_blocks[1].attention.register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
            model(**inputs)
        model.dual_blocks[1].attention._forward_pre_hooks.popitem()
        model(**inputs)
    assert [*passes[2]][0] == "latent.in" and "velocity.out" in passes[2]  # each pass starts anew
    assert "dual.0.context.out" in passes[1] and "velocity.out" not in passes[1]
    assert not hooks_of(model)


# ---- what is kept


def test_only_keeps_what_it_names():
    model, inputs = model_of(ROPE), inputs_for(ROPE)

    def kept(only):
        with trace(model, only) as passes:
            model(**inputs)
        return list(passes[0])

    everything = kept("")
    assert len(everything) == len(set(everything)) > 100
    assert kept("single.1.") == [name for name in everything if name.startswith("single.1.")]
    assert kept(("dual.0.attention.q", "velocity.out")) == ["dual.0.attention.q", "velocity.out"]
    assert kept(lambda name: name.endswith(".attended")) == [
        f"{kind}.{i}.attention.attended" for kind in ("dual", "single") for i in (0, 1)]


def test_each_pass_is_a_dict_of_its_own_and_skipped_blocks_are_missing():
    model, inputs = model_of(TABLE), inputs_for(TABLE)
    with trace(model, lambda name: name.endswith(".image.out")) as passes:
        model(**inputs)
        model(**inputs, skip_layers=(1,))
    assert "dual.1.image.out" in passes[0] and "dual.1.image.out" not in passes[1]
    assert torch.equal(passes[0]["dual.0.image.out"], passes[1]["dual.0.image.out"])


def test_compiled_blocks_and_float8_modulations_have_the_same_names(monkeypatch):
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    with trace(model) as wanted:
        model(**inputs, repulsion=Repulsion(0.1))
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)  # what is compiled is not recorded
    compile_blocks(model)
    for block in (*model.dual_blocks, *model.single_blocks):
        for layer in block.modules():
            if isinstance(layer, Modulation):
                layer.__class__ = type("Narrow", (Modulation,), {})
    with trace(model) as found:
        model(**inputs, repulsion=Repulsion(0.1))
    assert [*found[0]] == [*wanted[0]]
    assert any(name.endswith("repulsion.out") for name in found[0])


def test_blocks_that_visit_the_device_are_seen_at_their_places():
    model, inputs = model_of(ROPE), inputs_for(ROPE)
    with trace(model) as wanted:
        model(**inputs)
    streamed = stream_blocks(model, torch.device("cpu"))
    with trace(streamed) as found:
        streamed(**inputs)
    assert [*found[0]] == [*wanted[0]]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in wanted[0].items())
