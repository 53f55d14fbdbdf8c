"""Where repulsion acts in the model: which tokens, in which blocks, and among which samples."""

import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from test_model import ROPE, TABLE, difference, draw, model_of, randomize
from torch.nn import functional as F

import repulsion.config
from mmdit.blocks import DualBlock, SingleBlock
from repulsion import Repulsion, vendi_score

SAMPLES = 3
CONTEXT, IMAGE, REFERENCE = 5, 12, 8  # tokens; no two sums of them are equal
PUSH = Repulsion(scale=20.0, iterations=10)
STRENGTH = Repulsion(strength=0.5, iterations=10)

both_families = pytest.mark.parametrize("config", [ROPE, TABLE], ids=["rope", "table"])
both_lengths = pytest.mark.parametrize("push", [PUSH, STRENGTH], ids=["scale", "strength"])


def group(seed=0, samples=SAMPLES):
    """One prompt, several noises."""
    return {
        "latent": draw(samples, 4, 6, 8, seed=seed + 1),
        "sigma": torch.full((samples,), 0.9, dtype=torch.float64),
        "context": draw(1, CONTEXT, 24, seed=seed + 2).expand(samples, -1, -1),
        "pooled": draw(1, 20, seed=seed + 3).expand(samples, -1),
    }


@pytest.fixture
def calls(monkeypatch):
    """Every call of `repel` that a forward pass makes: (tokens, repelled tokens, settings)."""
    recorded, repel = [], repulsion.config.repel

    def recorder(tokens, **settings):
        repelled = repel(tokens, **settings)
        recorded.append((tokens.clone(), repelled.clone(), settings))
        return repelled

    monkeypatch.setattr(repulsion.config, "repel", recorder)
    return recorded


def count_pushed(tokens, repelled):
    """How many tokens of each sample a push has changed; they are the first ones."""
    changed = (tokens != repelled).any(-1)
    count = changed[0].sum().item()
    assert changed[:, :count].all() and not changed[:, count:].any()
    return count


# ---- what it does to the velocity


@both_families
@both_lengths
def test_no_repulsion_and_scale_zero_are_the_same_bits(config, push):
    model, inputs = model_of(config), group()
    none = replace(push, **{"scale" if push.strength is None else "strength": 0.0})
    assert torch.equal(model(**inputs, repulsion=none), model(**inputs))


@both_families
@both_lengths
def test_every_velocity_moves_unless_its_sample_is_alone(config, push):
    model, inputs = model_of(config), group()
    moved = model(**inputs, repulsion=push) - model(**inputs)
    assert (moved.flatten(1).norm(dim=1) / model(**inputs).flatten(1).norm(dim=1) > 1e-3).all()
    assert torch.equal(model(**inputs, repulsion=push, groups=SAMPLES), model(**inputs))


@both_families
@both_lengths
def test_tokens_end_further_apart(config, push, calls):
    model_of(config)(**group(), repulsion=push)
    assert calls
    for tokens, repelled, _ in calls:
        before, after = vendi_score(tokens.flatten(1)), vendi_score(repelled.flatten(1))
        assert after > before + 1e-3  # far above its rounding, far below the gain (0.01 and more)


# ---- among whom it acts

# A batch of another size or order moves a token by a rounding of float64 (1e-16). Repulsion widens the differences of
# samples, errors included: here by a factor of ten or so in each block.
TOLERANCE = 1e-13


@both_families
@both_lengths
def test_two_groups_in_a_batch_are_two_batches(config, push):
    model, one, other = model_of(config), group(), group(seed=10)
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    apart = torch.cat([model(**one, repulsion=push), model(**other, repulsion=push)])
    assert difference(model(**both, repulsion=push, groups=2), apart) < TOLERANCE
    assert difference(model(**both, repulsion=push), apart) > 1e-3  # one group of six is something else


@both_families
@both_lengths
def test_the_conditional_branch_alone_is_the_last_group_alone(config, push):
    model, one, other = model_of(config), group(), group(seed=10)
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    found = model(**both, repulsion=replace(push, branches="conditional"), groups=2)
    apart = torch.cat([model(**one), model(**other, repulsion=push)])
    assert difference(found, apart) < TOLERANCE
    assert difference(found, model(**both, repulsion=push, groups=2)) > 1e-3


@both_families
@both_lengths
def test_the_order_of_samples_does_not_matter(config, push):
    model, inputs = model_of(config), group(samples=4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(**{name: value[order] for name, value in inputs.items()}, repulsion=push)
    assert difference(permuted, model(**inputs, repulsion=push)[order]) < TOLERANCE


@both_families
def test_inference_mode_and_bfloat16_repel_too(config, calls):
    model, inputs = model_of(config), group()
    with torch.inference_mode():
        inference = model(**inputs, repulsion=PUSH)
    assert torch.equal(inference, model(**inputs, repulsion=PUSH))
    calls.clear()
    assert model.bfloat16()(**inputs, repulsion=PUSH).dtype == torch.bfloat16
    assert calls
    for tokens, repelled, _ in calls:
        assert tokens.dtype == repelled.dtype == torch.bfloat16
        assert not torch.equal(repelled, tokens)


# ---- where it acts: which tokens, in which blocks


C, R, N = CONTEXT, CONTEXT + IMAGE + REFERENCE, None
ALL = CONTEXT + IMAGE
# The tokens pushed in each block, in order, two dual-stream blocks and two single-stream ones; N: none.
ROPE_PLACES = [
    ({}, [C, C, ALL, ALL]),
    ({"single_stream_tokens": "context"}, [C, C, C, C]),
    ({"single_stream_tokens": "none"}, [C, C, N, N]),
    ({"blocks": "first"}, [C, C, N, N]),
    ({"blocks": "middle"}, [N, N, ALL, N]),
    ({"blocks": "last"}, [N, N, N, ALL]),
    ({"blocks": (0, 3)}, [C, N, N, ALL]),
    ({"blocks": (0, 3), "single_stream_tokens": "context"}, [C, N, N, C]),
    ({"blocks": (0, 3), "single_stream_tokens": "none"}, [C, N, N, N]),
    ({"blocks": ()}, [N, N, N, N]),
]
# Three dual-stream blocks, and the last has no context to push.
TABLE_PLACES = [
    ({}, [C, C, N]),
    ({"single_stream_tokens": "none"}, [C, C, N]),
    ({"blocks": "first"}, [C, N, N]),
    ({"blocks": "middle"}, [N, C, N]),
    ({"blocks": "last"}, [N, N, N]),
    ({"blocks": (0, 2)}, [C, N, N]),
]
PLACES = [(ROPE, *place) for place in ROPE_PLACES] + [(TABLE, *place) for place in TABLE_PLACES]


@pytest.mark.parametrize(("config", "settings", "pushed"), PLACES)
@both_lengths
def test_the_asked_tokens_of_the_asked_blocks_are_pushed(config, settings, pushed, push, calls):
    model = model_of(config)
    for block in (*model.dual_blocks, *model.single_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(None))  # a mark where each block begins
    push = replace(push, objective="rke", kernel_reg=1e-3, solver="autograd", iterations=2, **settings)
    model(**group(), repulsion=push)
    found = []
    for call in calls:
        found.append([]) if call is None else found[-1].append(count_pushed(*call[:2]))
    assert found == [[] if count is N else [count] for count in pushed]
    wanted = {"scale": push.scale, "strength": push.strength, "iterations": 2, "objective": "rke", "kernel_reg": 1e-3,
              "solver": "autograd", "groups": 1, "last_group": False}
    for _, _, named in filter(None, calls):
        assert named == wanted | {"first": named["first"]}


@pytest.mark.parametrize(("tokens", "pushed"), [("all", [C, C, R, R]), ("context", [C, C, C, C]), ("none", [C, C])])
def test_kontext_pushes_the_reference_with_the_image(tokens, pushed, calls):
    reference = draw(1, 4, 4, 8, seed=20).expand(SAMPLES, -1, -1, -1)
    model_of(ROPE)(**group(), reference=reference, repulsion=replace(PUSH, single_stream_tokens=tokens))
    assert [count_pushed(*call[:2]) for call in calls] == pushed


@both_families
def test_a_skipped_block_does_not_repel_and_the_others_keep_their_numbers(config, calls):
    model, inputs = model_of(config), group()
    plain = model(**inputs, skip_layers=(0,))
    assert torch.equal(model(**inputs, skip_layers=(0,), repulsion=replace(PUSH, blocks=(0,))), plain)
    assert not calls
    found = model(**inputs, skip_layers=(0,), repulsion=replace(PUSH, blocks=(1,)))
    assert [count_pushed(*call[:2]) for call in calls] == [C]
    assert difference(found, plain) > 1e-3


# ---- where it acts: one block by hand


def pushed_apart(tokens, push):
    """Eq. 2 as it stands: M times c ← c + (η / M) ∂H/∂c, H the entropy of the regularized cosine kernel.

    With a strength s, each of the M steps is s / M times as long as the tokens.
    """
    b, c = len(tokens), tokens.flatten(1)
    for _ in range(push.iterations):
        c = c.detach().requires_grad_()
        unit = F.normalize(c, dim=-1)
        kernel = unit @ unit.T + push.kernel_reg * torch.eye(b, dtype=c.dtype)
        values = torch.linalg.eigvalsh(kernel / (b * (1 + push.kernel_reg)))
        (gradient,) = torch.autograd.grad(-(values * values.log()).sum(), c)
        length = push.scale if push.strength is None else push.strength * tokens.norm() / gradient.norm()
        c = c + length / push.iterations * gradient
    return c.detach().reshape(tokens.shape)


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def modulation(layer, vector, parts):
    return F.linear(vector * vector.sigmoid(), layer.weight, layer.bias)[:, None].chunk(parts, dim=-1)


def modulated(x, shift, scale):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def rms_normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def heads_of(qkv, norm_q, norm_k):
    q, k, v = (rearrange(part, "b n (h k) -> b h n k", h=2) for part in qkv.chunk(3, dim=-1))
    return rms_normed(q, norm_q), rms_normed(k, norm_k), v


def attention(q, k, v):
    scores = (torch.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return rearrange(torch.einsum("bhnm,bhmk->bhnk", scores, v), "b h n k -> b n (h k)")


def mlp(stream, x):
    return stream.mlp.out_layer(gelu(stream.mlp.in_layer(x)))


def dual_block_by_hand(block, streams, vector, push):
    """`streams` are {"context": …, "image": …}; what the attention returns for the context is pushed."""
    parts, split = {}, {}
    for name, x in streams.items():
        own, into = getattr(block, name), getattr(block.attention, name)
        parts[name] = modulation(own.modulation, vector, 9 if name == "image" and block.image_attention else 6)
        qkv = into.qkv(modulated(x, *parts[name][:2]))
        split[name] = heads_of(qkv, into.norm_q, into.norm_k)
    q, k, v = (torch.cat(both, dim=2) for both in zip(split["context"], split["image"], strict=True))
    n = streams["context"].shape[1]
    joint = attention(q, k, v)

    after = {}
    for name, half in (("context", joint[:, :n]), ("image", joint[:, n:])):
        attended = getattr(block.attention, name).out(half)
        if name == "context":
            attended = pushed_apart(attended, push)
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *second = parts[name]
        x = streams[name] + gate * attended
        if second:  # the image alone, from the same tokens as the joint attention
            into = block.image_attention
            qkv = into.qkv(modulated(streams[name], *second[:2]))
            x = x + second[2] * into.out(attention(*heads_of(qkv, into.norm_q, into.norm_k)))
        after[name] = x + mlp_gate * mlp(getattr(block, name), modulated(x, mlp_shift, mlp_scale))
    return after["context"], after["image"]


def block_inputs():
    """Samples alike, as they are under one prompt: a common part and a tenth of their own."""
    context = draw(1, CONTEXT, 64, seed=1) + 0.1 * draw(SAMPLES, CONTEXT, 64, seed=2)
    image = draw(1, IMAGE, 64, seed=3) + 0.1 * draw(SAMPLES, IMAGE, 64, seed=4)
    return context, image, draw(1, 64, seed=5).expand(SAMPLES, -1)


# Both sides are float64 throughout (no rotation here): some twenty roundings of 1e-16, which repulsion widens by the
# ratio of the samples' length to their difference, here about ten.
BY_HAND = 1e-12


@pytest.mark.parametrize("config", [ROPE, TABLE], ids=["flux", "second attention"])
@both_lengths
def test_a_dual_stream_block_by_hand(config, push):
    torch.manual_seed(0)
    block = randomize(DualBlock(config, 0)).double()
    context, image, vector = block_inputs()
    found, plain = block(context, image, vector, None, push.bind(0, 1)), block(context, image, vector)
    wanted = dual_block_by_hand(block, {"context": context, "image": image}, vector, push)
    assert difference(found[0], wanted[0]) < BY_HAND and difference(found[1], wanted[1]) < BY_HAND
    # Within one block the push stays in the context: the image tokens attend to it in the next block.
    assert difference(found[0], plain[0]) > 1e-3 and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("pushed", ["all", "context", "none"])
@both_lengths
def test_a_single_stream_block_by_hand(pushed, push):
    torch.manual_seed(0)
    block, (context, image, vector) = randomize(SingleBlock(ROPE)).double(), block_inputs()
    tokens = torch.cat([context, image], dim=1)
    push, count = replace(push, single_stream_tokens=pushed), {"all": ALL, "context": CONTEXT, "none": 0}[pushed]

    shift, scale, gate = modulation(block.modulation, vector, 3)
    joint = block.linear_in(modulated(tokens, shift, scale))
    attended = attention(*heads_of(joint[..., :192], block.norm_q, block.norm_k))
    if count:
        attended = torch.cat([pushed_apart(attended[:, :count], push), attended[:, count:]], dim=1)
    wanted = tokens + gate * block.linear_out(torch.cat([attended, gelu(joint[..., 192:])], dim=-1))
    found, plain = block(tokens, vector, None, push.bind(0, 1, num_context=CONTEXT)), block(tokens, vector)
    assert difference(found, wanted) < BY_HAND
    assert torch.equal(found[:, count:], plain[:, count:])
    assert (difference(found, plain) > 1e-3) == (pushed != "none")
