"""Where repulsion acts in the model: which tokens, in which blocks, at which site, and among which samples."""

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

both_families = pytest.mark.parametrize("config", [ROPE, TABLE], ids=["rope", "table"])
both_sites = pytest.mark.parametrize("site", ["attention", "block"])


def group(seed=0, samples=SAMPLES):
    """One prompt, several noises."""
    return {
        "latent": draw(samples, 4, 6, 8, seed=seed + 1),
        "timestep": torch.full((samples,), 0.9, dtype=torch.float64),
        "context": draw(1, CONTEXT, 24, seed=seed + 2).expand(samples, -1, -1),
        "pooled": draw(1, 20, seed=seed + 3).expand(samples, -1),
    }


@pytest.fixture
def calls(monkeypatch):
    """Every call of `repel` that a forward pass makes: (tokens, repelled tokens, settings)."""
    recorded, repel = [], repulsion.config.repel

    def recorder(tokens, *settings, **named):
        repelled = repel(tokens, *settings, **named)
        recorded.append((tokens.clone(), repelled.clone(), (*settings, named)))
        return repelled

    monkeypatch.setattr(repulsion.config, "repel", recorder)
    return recorded


# ---- what it does to the velocity


@both_families
@both_sites
def test_no_repulsion_and_scale_zero_are_the_same_bits(config, site):
    model, inputs = model_of(config), group()
    assert torch.equal(model(**inputs, repulsion=replace(PUSH, scale=0.0, site=site)), model(**inputs))


@both_families
@both_sites
@pytest.mark.parametrize("tokens", ["context", "image"])
def test_every_velocity_moves_unless_its_sample_is_alone(config, site, tokens):
    model, inputs = model_of(config), group()
    push = replace(PUSH, site=site, tokens=tokens)
    moved = model(**inputs, repulsion=push) - model(**inputs)
    assert (moved.flatten(1).norm(dim=1) / model(**inputs).flatten(1).norm(dim=1) > 1e-3).all()
    assert torch.equal(model(**inputs, repulsion=push, groups=SAMPLES), model(**inputs))


@both_families
@both_sites
def test_tokens_end_further_apart(config, site, calls):
    model_of(config)(**group(), repulsion=replace(PUSH, site=site))
    assert calls
    for tokens, repelled, _ in calls:
        before, after = vendi_score(tokens.flatten(1)), vendi_score(repelled.flatten(1))
        assert after > before + 1e-3  # far above its rounding, far below the gain (0.01 and more)


# ---- among whom it acts


# Without rotation all is float64 (1e-16); the rotation rounds to float32 (6e-8) what a batch of another size or order
# may have moved by 1e-16. Repulsion widens the differences of samples, errors included: here by a factor of ten or so.
FAMILIES = [pytest.param(ROPE, 1e-5, id="rope"), pytest.param(TABLE, 1e-11, id="table")]


@pytest.mark.parametrize(("config", "tolerance"), FAMILIES)
@both_sites
def test_two_groups_in_a_batch_are_two_batches(config, tolerance, site):
    model, push, one, other = model_of(config), replace(PUSH, site=site), group(), group(seed=10)
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    apart = torch.cat([model(**one, repulsion=push), model(**other, repulsion=push)])
    assert difference(model(**both, repulsion=push, groups=2), apart) < tolerance
    assert difference(model(**both, repulsion=push), apart) > 1e-3  # one group of six is something else


@pytest.mark.parametrize(("config", "tolerance"), FAMILIES)
@both_sites
@pytest.mark.parametrize("tokens", ["context", "image", "scores"])
def test_the_conditional_branch_alone_is_the_last_group_alone(config, tolerance, site, tokens):
    model, push, one, other = model_of(config), replace(PUSH, site=site, tokens=tokens), group(), group(seed=10)
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    found = model(**both, repulsion=replace(push, branches="conditional"), groups=2)
    apart = torch.cat([model(**one), model(**other, repulsion=push)])
    assert difference(found, apart) < tolerance
    assert difference(found, model(**both, repulsion=push, groups=2)) > 1e-3


@pytest.mark.parametrize(("config", "tolerance"), FAMILIES)
@both_sites
def test_the_order_of_samples_is_no_matter(config, tolerance, site):
    model, inputs, push = model_of(config), group(samples=4), replace(PUSH, site=site)
    order = torch.tensor([2, 0, 3, 1])
    permuted = model(**{name: value[order] for name, value in inputs.items()}, repulsion=push)
    assert difference(permuted, model(**inputs, repulsion=push)[order]) < tolerance


@both_families
def test_inference_mode_and_bfloat16_repel_too(config, calls):
    model, inputs = model_of(config), group()
    with torch.inference_mode():
        inference = model(**inputs, repulsion=PUSH)
    assert torch.equal(inference, model(**inputs, repulsion=PUSH))
    calls.clear()
    assert model.bfloat16()(**inputs, repulsion=PUSH).dtype == torch.bfloat16
    for tokens, repelled, _ in calls:
        assert tokens.dtype == repelled.dtype == torch.bfloat16
        assert not torch.equal(repelled, tokens)


# ---- where it acts: which streams, in which blocks


C, I, R, N = CONTEXT, IMAGE, IMAGE + REFERENCE, None  # noqa: E741
ALL = CONTEXT + IMAGE
# The tokens pushed in each block, in order, two dual-stream blocks and two single-stream ones; N: none.
ROPE_PLACES = [
    ({}, [C, C, ALL, ALL]),
    ({"single_stream_tokens": "context"}, [C, C, C, C]),
    ({"single_stream_tokens": "none"}, [C, C, N, N]),
    ({"tokens": "image"}, [I, I, I, I]),
    ({"tokens": "image", "single_stream_tokens": "none"}, [I, I, I, I]),
    ({"blocks": "first"}, [C, C, N, N]),
    ({"blocks": "middle"}, [N, N, ALL, N]),
    ({"blocks": "last"}, [N, N, N, ALL]),
    ({"blocks": (0, 3)}, [C, N, N, ALL]),
    ({"blocks": (0, 3), "tokens": "image"}, [I, N, N, I]),
    ({"blocks": ()}, [N, N, N, N]),
]
# Three dual-stream blocks, and the last has no context to push.
TABLE_PLACES = [
    ({}, [C, C, N]),
    ({"tokens": "image"}, [I, I, I]),
    ({"blocks": "first"}, [C, N, N]),
    ({"blocks": "middle"}, [N, C, N]),
    ({"blocks": "last"}, [N, N, N]),
    ({"blocks": "last", "tokens": "image"}, [N, N, I]),
    ({"blocks": (0, 2)}, [C, N, N]),
    ({"blocks": (0, 2), "tokens": "image"}, [I, N, I]),
]
PLACES = [(ROPE, *place) for place in ROPE_PLACES] + [(TABLE, *place) for place in TABLE_PLACES]


@both_sites
@pytest.mark.parametrize(("config", "settings", "pushed"), PLACES)
def test_the_asked_tokens_of_the_asked_blocks_are_pushed(config, settings, pushed, site, calls):
    model = model_of(config)
    for block in (*model.dual_blocks, *model.single_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(None))  # a mark where each block begins
    push = replace(PUSH, site=site, objective="rke", kernel_reg=1e-3, solver="autograd", iterations=2, **settings)
    model(**group(), repulsion=push)
    found = []
    for call in calls:
        found.append([]) if call is None else found[-1].append(call[0].shape[1])
    assert found == [[] if count is N else [count] for count in pushed]
    wanted = (20.0, 2, {"diversity": None, "objective": "rke", "kernel_reg": 1e-3, "solver": "autograd", "groups": 1})
    assert all(call[2] == wanted for call in calls if call)


@both_sites
@pytest.mark.parametrize(("tokens", "pushed"), [("context", [C, C, C + R, C + R]), ("image", [R, R, R, R])])
def test_kontext_pushes_the_reference_with_the_image(tokens, pushed, site, calls):
    reference = draw(1, 4, 4, 8, seed=20).expand(SAMPLES, -1, -1, -1)
    model_of(ROPE)(**group(), reference=reference, repulsion=replace(PUSH, site=site, tokens=tokens))
    assert [tokens.shape[1] for tokens, _, _ in calls] == pushed


# ---- where it acts: one block by hand


def pushed_apart(tokens, push):
    """Eq. 2 as it stands: M times c ← c + (η / M) ∂H/∂c, H the entropy of the regularized cosine kernel."""
    b, c = len(tokens), tokens.flatten(1)
    for _ in range(push.iterations):
        c = c.detach().requires_grad_()
        unit = F.normalize(c, dim=-1)
        kernel = unit @ unit.T + push.kernel_reg * torch.eye(b, dtype=c.dtype)
        values = torch.linalg.eigvalsh(kernel / (b * (1 + push.kernel_reg)))
        (gradient,) = torch.autograd.grad(-(values * values.log()).sum(), c)
        c = c + push.scale / push.iterations * gradient
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
    """`streams` are {"context": …, "image": …}; the stream and the site that `push` names are pushed."""
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
        if (push.site, push.tokens) == ("attention", name):
            attended = pushed_apart(attended, push)
        _, _, gate, mlp_shift, mlp_scale, mlp_gate, *second = parts[name]
        x = streams[name] + gate * attended
        if second:  # the image alone, from the same tokens as the joint attention, never pushed
            into = block.image_attention
            qkv = into.qkv(modulated(streams[name], *second[:2]))
            x = x + second[2] * into.out(attention(*heads_of(qkv, into.norm_q, into.norm_k)))
        x = x + mlp_gate * mlp(getattr(block, name), modulated(x, mlp_shift, mlp_scale))
        after[name] = pushed_apart(x, push) if (push.site, push.tokens) == ("block", name) else x
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
@both_sites
@pytest.mark.parametrize("tokens", ["context", "image"])
def test_a_dual_stream_block_by_hand(config, site, tokens):
    torch.manual_seed(0)
    block, push = randomize(DualBlock(config, 0)).double(), replace(PUSH, site=site, tokens=tokens)
    context, image, vector = block_inputs()
    found, plain = block(context, image, vector, None, push, 1), block(context, image, vector)
    wanted = dual_block_by_hand(block, {"context": context, "image": image}, vector, push)
    for name, a, b, c in zip(("context", "image"), found, wanted, plain, strict=True):
        assert difference(a, b) < BY_HAND
        # Within one block the push stays in its own stream: the other sees it in the next attention.
        assert difference(a, c) > 1e-3 if name == tokens else torch.equal(a, c)


@both_sites
@pytest.mark.parametrize("pushed", ["all", "context", "none", "image"])
def test_a_single_stream_block_by_hand(site, pushed):
    torch.manual_seed(0)
    block, (context, image, vector) = randomize(SingleBlock(ROPE)).double(), block_inputs()
    tokens = torch.cat([context, image], dim=1)
    settings = {"tokens": "image"} if pushed == "image" else {"single_stream_tokens": pushed}
    push = replace(PUSH, site=site, **settings)
    start, stop = {"all": (0, ALL), "context": (0, CONTEXT), "none": (0, 0), "image": (CONTEXT, ALL)}[pushed]

    def push_at(here, x):
        if here != site or start == stop:
            return x
        return torch.cat([x[:, :start], pushed_apart(x[:, start:stop], push), x[:, stop:]], dim=1)

    shift, scale, gate = modulation(block.modulation, vector, 3)
    joint = block.linear_in(modulated(tokens, shift, scale))
    attended = push_at("attention", attention(*heads_of(joint[..., :192], block.norm_q, block.norm_k)))
    wanted = tokens + gate * block.linear_out(torch.cat([attended, gelu(joint[..., 192:])], dim=-1))
    wanted = push_at("block", wanted)
    found = block(tokens, vector, CONTEXT, None, push, 1)
    assert difference(found, wanted) < BY_HAND
    assert (difference(found, block(tokens, vector, CONTEXT)) > 1e-3) == (pushed != "none")
