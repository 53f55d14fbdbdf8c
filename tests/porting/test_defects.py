"""Usual mistakes, planted in our own model or made by hand: the checker names the tensor and the mistake."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

import mmdit.attention
import mmdit.autoencoder
import mmdit.blocks
import mmdit.clip
import mmdit.layers
import mmdit.model
import mmdit.position
import mmdit.t5
import repulsion.config
import weights
from porting import Run, compare, record, report

SDPA = F.scaled_dot_product_attention
FOLDER = weights.BUNDLED["tiny-sd3"]
VAE = json.loads((FOLDER / "vae" / "config.json").read_text())
SCALING, SHIFT = VAE["scaling_factor"], VAE["shift_factor"]
W = json.loads((FOLDER / "sampling.json").read_text())["guidance"]
START_TOKEN = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text())["<|startoftext|>"]


class Broken:
    """A pipeline with a run, in which a defect is planted until the test ends."""

    def __init__(self, pipeline, run, monkeypatch):
        self.pipeline, self.run, self.patch = pipeline, run, monkeypatch
        self.clips = [part.module for _, part in pipeline.text.clips]
        self.model, self.autoencoder = pipeline.transformer, pipeline.autoencoder

    def functional(self, module, **replaced):
        """Other functions in what a module calls F."""
        own = {name: getattr(F, name) for name in ("scaled_dot_product_attention", "gelu", "layer_norm", "silu")}
        self.patch.setattr(module, "F", SimpleNamespace(**own | replaced))

    def pattern(self, module, old, new):
        """Another einops pattern in a module, wherever `old` is a part of it."""
        self.patch.setattr(module, "rearrange", lambda x, pattern, **sizes: rearrange(
            x, pattern.replace(old, new), **sizes))

    def wrapped(self, module, name, change):
        """A function whose result `change` replaces: change(result, *arguments)."""
        own = getattr(module, name)
        self.patch.setattr(module, name, lambda *args, **named: change(own(*args, **named), *args))


def edited(layer, change):
    """A linear layer whose rows are changed."""
    layer.weight.data = change(layer.weight.data)
    layer.bias.data = change(layer.bias.data)


def for_all(modules, kind, name, value):
    for module in modules:
        for part in module.modules():
            if isinstance(part, kind):
                setattr(part, name, value)


def time_features(change):
    return lambda it: it.wrapped(mmdit.model, "timestep_features", change)


def rescaled(it):
    own = mmdit.model.timestep_features
    it.patch.setattr(mmdit.model, "timestep_features", lambda t: own(t / 1000))


def table_from_its_corner(it):
    def crop(found, table, rows, columns):
        return rearrange(table, "one (s t) d -> one s t d", s=16)[:, :rows, :columns].flatten(1, 2)

    it.wrapped(mmdit.model, "crop_table", crop)


def modulation(formula):
    return lambda it: it.patch.setattr(mmdit.blocks, "modulate", lambda x, by: formula(
        x, by.shift, by.scale, lambda x, eps=1e-6: F.layer_norm(x, x.shape[-1:], eps=eps)))


def no_norm_of_q(it):
    it.model.dual_blocks[0].attention.context.norm_q = nn.Identity()


def attention(**how):
    return lambda it: it.functional(mmdit.attention, scaled_dot_product_attention=lambda q, k, v: SDPA(q, k, v, **how))


def exact_gelu(it):
    for_all([it.model], nn.GELU, "approximate", "none")


def no_gate(it):
    def ungated(found, *_):
        return found if found.mlp is None else found._replace(mlp=found.mlp._replace(gate=1))

    it.wrapped(mmdit.blocks, "StreamModulation", ungated)


def pushed(change):
    return lambda it: it.wrapped(repulsion.config, "repel", change)


def other_blocks(it):
    push = replace(it.run.repulsion, blocks=(0,))
    it.run = Run(**vars(it.run) | {"repulsion": push, "repels_in": (0,)})


def exchanged(*names):
    """The weights of two layers, by names in the model of a part: a network, and two paths in it."""
    def plant(it):
        network = {"clip": it.clips[0], "t5": it.pipeline.text.t5[1].module, "mmdit": it.model}[names[0]]
        first, second = (network.get_submodule(name) for name in names[1:])
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            a.data, b.data = b.data, a.data

    return plant


def transposed(it):
    it.model.dual_blocks[0].attention.image.out.weight.data = it.model.dual_blocks[0].attention.image.out.weight.data.mT


def transposed_value(it):
    weight = it.clips[0].layers[0].attention.qkv.weight.data
    weight[96:] = weight[96:].mT.clone()


def no_bias(it):
    it.model.dual_blocks[7].image.mlp.in_layer.bias.data.zero_()


def bilinear(it):
    own = mmdit.autoencoder.F.interpolate
    it.patch.setattr(mmdit.autoencoder, "F", SimpleNamespace(**vars(F) | {
        "interpolate": lambda x, scale_factor, mode: own(x, scale_factor=scale_factor, mode="bilinear")}))


def padding_masked(it):
    def masked(q, k, v, attn_mask, scale):
        hidden = torch.where(torch.arange(24) < 24 - it.pads.pop(0), 0, -torch.inf)
        return SDPA(q, k, v, attn_mask=attn_mask + hidden, scale=scale)

    ids, rows = it.run.tokens["t5"][0], [0, 1, 0, 2]
    it.pads = [24 - len(ids[row]) for row in rows for _ in range(2)]
    it.functional(mmdit.t5, scaled_dot_product_attention=masked)


FOUND = "found: "  # the mistake is told by its result; otherwise it stands among the usual causes

DEFECTS = {
    "no causal mask in CLIP": (
        lambda it: it.functional(mmdit.clip, scaled_dot_product_attention=lambda q, k, v, is_causal: SDPA(q, k, v)),
        "clip_l.layer_0", FOUND + "no causal mask"),
    "CLIP-G's activation": (
        lambda it: for_all(it.clips[1:], mmdit.layers.MLP, "activation", mmdit.clip.quick_gelu),
        "clip_g.layer_0", FOUND + "another activation: it is the exact GELU"),
    "CLIP's eps": (lambda it: for_all(it.clips, nn.LayerNorm, "eps", 1e-6), "clip_l.layer_0",
                   FOUND + "another eps: it is 1e-5"),
    "CLIP pooled at another token": (
        lambda it: setattr(it.clips[0], "config", replace(it.clips[0].config, end_token=START_TOKEN)),
        "clip_l.pooled", FOUND + "the state of the last token, or of the first"),
    "norms of CLIP swapped": (exchanged("clip", "layers.0.norm_1", "layers.0.norm_2"), "clip_l.layer_0",
                              FOUND + "norm_1 for norm_2"),
    "layers of CLIP swapped": (exchanged("clip", "layers.0", "layers.1"), "clip_l.layer_0",
                               FOUND + "the weights of another layer"),
    "a square matrix of CLIP transposed": (transposed_value, "clip_l.layer_0",
                                           FOUND + "not transposed: text_model.encoder.layers.0.self_attn.v_proj"),
    "scores of T5 divided": (
        lambda it: it.functional(mmdit.t5, scaled_dot_product_attention=lambda q, k, v, attn_mask, scale:
                                 SDPA(q, k, v, attn_mask=attn_mask)),
        "t5.layer_0", FOUND + "scores divided by √k: T5 does not divide"),
    "exact GELU in T5": (
        lambda it: for_all([it.pipeline.text.t5[1].module], mmdit.layers.GatedMLP, "activation", F.gelu),
        "t5.layer_0", FOUND + "another activation"),
    "gate and value of T5 swapped": (exchanged("t5", "layers.0.mlp.gate", "layers.0.mlp.value"), "t5.layer_0",
                                     FOUND + "gate for value"),
    "padding of T5 masked": (padding_masked, "t5.layer_0", FOUND + "padding masked: T5 attends to it"),
    "LayerNorm in T5": (
        lambda it: it.patch.setattr(nn.RMSNorm, "forward", lambda norm, x: norm.weight * F.layer_norm(
            x, x.shape[-1:], eps=1e-6) if x.shape[-1] == 128 and x.ndim == 3 else F.rms_norm(
            x, x.shape[-1:], norm.weight, 1e-6)), "t5.layer_0", FOUND + "LayerNorm in place of RMSNorm"),
    "σ for 1000 σ": (rescaled, "time_in.in", FOUND + "σ for 1000 σ"),
    "sines first": (time_features(lambda found, _: found.roll(128, -1)), "time_in.in", FOUND + "sines before cosines"),
    "patches as (p q c)": (
        lambda it: it.pattern(mmdit.model, "-> b (rows columns) (c p q)", "-> b (rows columns) (p q c)"),
        "image_in.in", FOUND + "a patch's values in another order"),
    "table from its corner": (table_from_its_corner, "dual.0.image.in", FOUND + "the position table cropped"),
    "scale and shift swapped": (modulation(lambda x, shift, scale, norm: (1 + shift) * norm(x) + scale),
                                "dual.0.attention.context.in", FOUND + "shift and scale swapped"),
    "scale for 1 + scale": (modulation(lambda x, shift, scale, norm: scale * norm(x) + shift),
                            "dual.0.attention.context.in", FOUND + "scale for 1 + scale"),
    "LayerNorm's eps": (modulation(lambda x, shift, scale, norm: (1 + scale) * norm(x, 1e-3) + shift),
                        "dual.0.attention.context.in", FOUND + "another eps: it is 1e-6"),
    "variance by d − 1": (modulation(lambda x, shift, scale, norm: shift + (1 + scale) * (
        x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()), "dual.0.attention.context.in",
        FOUND + "the variance divided by d − 1"),
    "heads transposed": (lambda it: it.pattern(mmdit.attention, "(three h k)", "(three k h)"),
                         "dual.0.attention.v", FOUND + "heads as (k h)"),
    "q, k, v inside the heads": (lambda it: it.pattern(mmdit.attention, "(three h k)", "(h three k)"),
                                 "dual.0.attention.v", FOUND + "rows in another order"),
    "q not normalized": (no_norm_of_q, "dual.0.attention.q", "the norm left out"),
    "q's norm for k's": (exchanged("mmdit", "dual_blocks.0.attention.image.norm_q",
                                   "dual_blocks.0.attention.image.norm_k"), "dual.0.attention.q",
                         "the norm left out"),
    "all of q's and k's norms swapped": (
        lambda it: [exchanged("mmdit", f"{x}.norm_q", f"{x}.norm_k")(it) for x in (
            "dual_blocks.0.attention.image", "dual_blocks.0.attention.context")],
        "dual.0.attention.q", FOUND + "norm_q for norm_k"),
    "no 1/√k": (attention(scale=1.0), "dual.0.attention.attended", FOUND + "the scores not divided by √k"),
    "causal": (attention(is_causal=True), "dual.0.attention.attended", FOUND + "a causal mask"),
    "heads joined as (k h)": (lambda it: it.pattern(mmdit.attention, "-> b n (h k)", "-> b n (k h)"),
                              "dual.0.repulsion.in", FOUND + "heads joined as (k h)"),
    "a square matrix transposed": (transposed, "dual.0.attention.image.out",
                                   FOUND + "not transposed: transformer_blocks.0.attn.to_out.0.weight"),
    "exact GELU": (exact_gelu, "dual.0.image.mlp.activation.out", FOUND + "another activation"),
    "no gate": (no_gate, "dual.0.image.out", FOUND + "no gate after the MLP"),
    "no bias": (no_bias, "dual.7.image.mlp.in_layer.out", FOUND + "the bias left out"),
    "the weights of the block before": (exchanged("mmdit", "dual_blocks.7.image.mlp", "dual_blocks.6.image.mlp"),
                                        "dual.7.image.in", "the blocks (0, 1, 2, 3, 4, 5, 6) repel"),
    "not pushed": (pushed(lambda found, tokens, *_: tokens.clone()), "dual.0.repulsion.out",
                   FOUND + "pushed together, or not at all"),
    "pushed together": (pushed(lambda found, tokens, *_: 2 * tokens - found), "dual.0.repulsion.out",
                        FOUND + "pushed together"),
    "repulsion in one block": (other_blocks, "dual.7.context.in", "the blocks (0, 1, 2, 3, 4, 5, 6) repel"),
    "rows of the last layer as in SD3's files": (
        lambda it: edited(it.model.image_out, lambda rows: rearrange(rows, "(c p q) ... -> (p q c) ...", p=2, q=2)),
        "image_out.out", FOUND + "proj_out.weight: its rows are stored as (p q c)"),
    "eps of the decoder": (lambda it: for_all([it.autoencoder], nn.GroupNorm, "eps", 1e-3), "decoder.middle.out",
                           FOUND + "another eps: it is 1e-6"),
    "bilinear upsampling": (bilinear, "decoder.levels.0.out", FOUND + "upsampling bilinear"),
    "blue, green, red": (lambda it: edited(it.autoencoder.decoder.conv_out, lambda rows: rows.flip(0)), "image",
                         FOUND + "rows and columns swapped, or channels as blue, green, red"),
}


def assert_named(said, name, words):
    after = said.partition("first deviation: ")[2].partition("also found")[0]
    assert after.startswith(f"{name}, in stage") and words in after, after
    assert words.startswith(FOUND) == ("found: " in after), after


@pytest.mark.parametrize(("plant", "name", "words"), DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_is_named(kit, run, pipeline, monkeypatch, plant, name, words):
    broken = Broken(pipeline, run, monkeypatch)
    plant(broken)
    assert_named(report(compare(kit, record(broken.pipeline, broken.run))), name, words)


def rotation(change):
    return lambda it: it.wrapped(mmdit.attention, "rotate", change)


def half_split(found, x, rope):
    (cos, sin), (first, second) = rope, x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def other_positions(change):
    def plant(it):
        own = mmdit.model.rope_angles
        it.patch.setattr(mmdit.model, "rope_angles", lambda positions, *rest: own(change(positions), *rest))

    return plant


def numbered(positions):
    return torch.cat([torch.arange(24.0).expand(3, 24).mT, positions[24:]])


def guidance_in_ones(it):
    """The second call of the features, that for the guidance."""
    own, calls = mmdit.model.timestep_features, []

    def features(level):
        calls.append(level)
        return own(level if len(calls) % 2 else level / 1000)

    it.patch.setattr(mmdit.model, "timestep_features", features)


def exact_gelu_in_single_blocks(it):
    for_all(it.model.single_blocks, nn.GELU, "approximate", "none")


def activation_first(it):
    def cat(tensors, dim=0):
        widths = [tensor.shape[-1] for tensor in tensors]
        return torch.cat(tensors[::-1] if dim == -1 and widths == [64, 256] else tensors, dim=dim)

    it.patch.setattr(mmdit.blocks, "torch", SimpleNamespace(cat=cat))


def image_first(it):
    def cat(tensors, dim=0):
        return torch.cat(tensors[::-1] if dim == 1 and len(tensors) == 2 else tensors, dim=dim)

    it.patch.setattr(mmdit.model, "torch", SimpleNamespace(**vars(torch) | {"cat": cat}))


FLUX_DEFECTS = {
    "RoPE in halves": (rotation(half_split), "dual.0.attention.q", FOUND + "RoPE: pairs (j, j + k/2)"),
    "RoPE the other way": (rotation(lambda found, x, rope: mmdit.position.rotate(x, torch.stack([rope[0], -rope[1]]))),
                           "dual.0.attention.q", FOUND + "RoPE: rotated the other way"),
    "no RoPE": (rotation(lambda found, x, rope: x), "dual.0.attention.q", FOUND + "RoPE: not rotated"),
    "rows and columns swapped": (other_positions(lambda x: x[:, [0, 2, 1]]), "dual.0.rope.in",
                                 FOUND + "rows and columns swapped"),
    "context numbered": (other_positions(numbered), "dual.0.rope.in", FOUND + "context tokens numbered"),
    "sin before cos": (lambda it: it.wrapped(mmdit.model.MMDiT, "rope", lambda found, *_: found.flip(0)),
                       "dual.0.rope.in", FOUND + "sin before cos"),
    "guidance for 1000 · guidance": (guidance_in_ones, "guidance_in.in", FOUND + "σ for 1000 σ"),
    "image before context": (image_first, "single.0.tokens.in", FOUND + "the image's tokens before the context's"),
    "exact GELU in single-stream blocks": (exact_gelu_in_single_blocks, "single.0.activation.out",
                                           FOUND + "another activation"),
    "activation before attention": (activation_first, "single.0.linear_out.in",
                                    FOUND + "the activation before the attention"),
}


@pytest.mark.parametrize(("plant", "name", "words"), FLUX_DEFECTS.values(), ids=FLUX_DEFECTS)
def test_a_defect_planted_in_flux_is_named(flux_kit, flux_run, flux_pipeline, monkeypatch, plant, name, words):
    broken = Broken(flux_pipeline, flux_run, monkeypatch)
    plant(broken)
    assert_named(report(compare(flux_kit, record(flux_pipeline, flux_run))), name, words)


# ---- made by hand from the kit's tensors, as a port does that is fed with them


def other_pad(k):
    return torch.where(torch.arange(24) >= torch.tensor([2, 4, 6])[:, None], START_TOKEN, k["clip_l.ids"])


def t5_first(k):
    return torch.cat([k["t5.states"], k["context"][:, :24]], 1)


def clips_swapped(k):
    width = [k[f"clip_{x}.penultimate"].shape[-1] for x in "lg"]
    clips = torch.cat([k["clip_g.penultimate"], k["clip_l.penultimate"], k["context"][:, :24, sum(width):]], -1)
    return torch.cat([clips, k["t5.states"]], 1)


def in_order(*rows):
    """context_in.out with samples of these prompts."""
    return lambda k: k["context_in.out"][[{0: 0, 1: 4, 2: 6}[row] for row in rows]]


def steps(length, anew=True):
    """A push of other steps; `length` of s, and the norms of the groups' tokens and of their step's direction."""
    def mixing(k):
        gram = k["dual.0.repulsion.gram"].double()
        a = torch.eye(2).double().expand(4, 2, 2)
        for _ in range(3):
            step = direction(a @ gram @ a.mT) @ a if anew else direction(gram)
            a = a + length(1.5 / 3, gram, step @ gram @ step.mT) * step
        return a - torch.eye(2)

    return mixing


def direction(gram, eps=1e-4):
    """∂H/∂c_i of a group of two, by its closed form: λ are (1 ± K_12 + ε) / (2 (1 + ε))."""
    n, c = gram.diagonal(dim1=1, dim2=2).sqrt(), gram[:, 0, 1]
    k = c / n.prod(1)
    slope = -0.5 / (1 + eps) * ((1 + k + eps) / (1 - k + eps)).log()  # ∂H/∂K_12
    d = torch.stack([-k / n[:, 0] ** 2, 1 / n.prod(1), 1 / n.prod(1), -k / n[:, 1] ** 2], 1).unflatten(1, (2, 2))
    return slope[:, None, None] * d


def size(gram):
    return gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None]


def each(gram):
    return gram.diagonal(dim1=1, dim2=2).sqrt()[..., None]


def as_picture(x, pattern):
    return rearrange(x, f"b (h w) {pattern} -> b c (h p) (w q)", h=8, p=2, q=2)


def clamped(_):
    s = math.exp(0.5)
    return torch.tensor([s * t / (1 + (s - 1) * t) for t in (1.0, 0.5, 0.0)])


R, E, L1 = "dual.0.repulsion.", "dual.0.repulsion.mixing", "latent.1"
BY_HAND = {
    "pad token": ("clip_l.ids", other_pad, "another pad token"),
    "T5 before CLIP": ("context", t5_first, "T5's tokens before CLIP's"),
    "CLIPs in the other order": ("context", clips_swapped, "the CLIPs in the other order"),
    "pooled vectors in the other order": ("pooled", lambda k: k["pooled"].roll(16, -1), "the CLIPs in the other order"),
    "conditional branch first": ("context_in.out", in_order(1, 1, 2, 2, 0, 0, 0, 0), "the conditional branch before"),
    "prompts interleaved": ("context_in.out", in_order(0, 0, 0, 0, 1, 2, 1, 2), "samples in another order"),
    "prompts swapped": ("context_in.out", in_order(0, 0, 0, 0, 2, 2, 1, 1), "samples in another order"),
    "modulation as (d parts)": (
        "dual.0.image.modulation", lambda k: k["dual.0.image.modulation"].flatten(1).unflatten(1, (128, 6)).mT,
        "the layer's rows as (d parts)"),
    "last modulation as on the hub": ("final_modulation", lambda k: k["final_modulation"].flip(1),
                                      "norm_out.linear.weight: stored as (scale, shift)"),
    "eps in fed mode": ("dual.0.attention.image.in", lambda k: (1 + k["dual.0.image.modulation"][:, 1, None]) *
                        F.layer_norm(k["dual.0.image.in"], (128,), eps=1e-5) +
                        k["dual.0.image.modulation"][:, 0, None], "another eps: it is 1e-6"),
    "softmax over the queries": (
        "dual.0.attention.attended", lambda k: (k["dual.0.attention.q"] @ k["dual.0.attention.k"].mT / 32**0.5).softmax(
            -2) @ k["dual.0.attention.v"], "softmax over the queries"),
    "kernel not normalized": (R + "kernel", lambda k: k[R + "gram"], "not normalized"),
    "no ε": (R + "spectrum", lambda k: torch.linalg.eigvalsh(k[R + "kernel"] / 2), "no ε"),
    "not divided by the trace": (R + "spectrum", lambda k: k[R + "spectrum"] * 2 * 1.0001, "not divided by the trace"),
    "entropy falls": (R + "gradient", lambda k: -k[R + "gradient"], "the other sign, or half of it"),
    "half the gradient": (R + "gradient", lambda k: k[R + "gradient"] / 2, "the other sign, or half of it"),
    "gradient not normalized": (E, steps(lambda s, g, m: s), "the gradient not normalized"),
    "one gradient": (E, steps(lambda s, g, m: s * size(g) / size(m), anew=False), "all steps along the first"),
    "strength not divided": (E, steps(lambda s, g, m: 3 * s * size(g) / size(m)), "each step as long as"),
    "length of each sample": (E, steps(lambda s, g, m: s * each(g) / each(m)), "both norms of each sample"),
    "length of one sample": (E, steps(lambda s, g, m: s * size(g) / size(m) / 2**0.5), "‖C‖ of one sample"),
    "length of the batch": (E, steps(lambda s, g, m: s * size(g).norm() / size(m).norm()), "both norms of the whole"),
    "velocity of other patches": ("velocity.unconditional", lambda k: as_picture(k["image_out.out"][:4], "(p q c)"),
                                  "a patch's values in another order"),
    "branches of the velocity swapped": ("velocity.conditional", lambda k: k["velocity.unconditional"],
                                         "the branches swapped"),
    "guidance the wrong way": ("velocity.guided", lambda k: (1 + W) * k["velocity.unconditional"] - W *
                               k["velocity.conditional"], "the guidance the wrong way"),
    "guidance from the conditional": ("velocity.guided", lambda k: (1 + W) * k["velocity.conditional"] - W *
                                      k["velocity.unconditional"], "added to the conditional"),
    "Euler the wrong way": (L1, lambda k: 2 * k["noise"] - k[L1], "a step the wrong way"),
    "shift subtracted": ("decoder.in", lambda k: k["decoder.in"] - 2 * SHIFT, "the shift subtracted"),
    "scaling multiplied": ("decoder.in", lambda k: k[L1] * SCALING + SHIFT, "multiplied with the scaling"),
    "pixels truncated": ("pixels", lambda k: ((k["image"].clip(-1, 1) + 1) * 127.5).byte().movedim(1, -1), "truncated"),
    "GroupNorm of interleaved channels": ("image", lambda k: k["image"].mT, "rows and columns swapped"),
}


@pytest.mark.parametrize(("name", "make", "words"), BY_HAND.values(), ids=BY_HAND)
def test_a_mistake_made_by_hand_is_named_in_fed_mode(kit, name, make, words):
    k = {x: tensor.double() if tensor.is_floating_point() else tensor for x, tensor in kit.tensors.items()}
    wrong = make(k)
    said = report(compare(kit, {name: wrong.to(kit.tensors[name].dtype)}, fed=True), fed=True)
    assert_named(said, name, FOUND + words)


def test_the_push_by_hand_is_the_kit_s(kit):
    """The closed form above is right: what it gives without a mistake passes."""
    rows = compare(kit, {R + "mixing": steps(lambda s, g, m: s * size(g) / size(m))(kit.tensors)}, fed=True)
    assert [row.passed for row in rows if row.passed is not None] == [True]


FLUX_BY_HAND = {
    "σ not shifted": ("sigmas", lambda _: torch.tensor([1.0, 0.5, 0.0]), "σ not shifted"),
    "σ clamped at 256 tokens": ("sigmas", clamped, "μ clamped at 256 image tokens"),
    "prompts interleaved": ("context_in.out", lambda k: k["context_in.out"][[0, 2, 0, 2]], "samples in another order"),
    "one gradient": (R + "mixing", lambda k: 100 * direction(k[R + "gram"].double()), "all steps along the first"),
}


@pytest.mark.parametrize(("name", "make", "words"), FLUX_BY_HAND.values(), ids=FLUX_BY_HAND)
def test_a_mistake_made_by_hand_in_flux_is_named(flux_kit, name, make, words):
    said = report(compare(flux_kit, {name: make(flux_kit.tensors)}, fed=True), fed=True)
    assert_named(said, name, FOUND + words)
