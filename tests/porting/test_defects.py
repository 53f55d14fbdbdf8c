"""Our own model, broken as ports are: the checker names the stage and, where the numbers tell it, the mistake."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn import functional as F

import mmdit.attention
import mmdit.blocks
import mmdit.clip
import mmdit.model
import mmdit.t5
import porting.recording
import repulsion.config
import repulsion.solvers
import sampler.conditioning
import sampler.pipeline
from porting import compare, record, report
from porting.recording import Watch
from repulsion.objectives import OBJECTIVES

SDPA = F.scaled_dot_product_attention


class Broken:
    """A pipeline with a run, and what a defect needs to be planted in it until the test is over."""

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


def other_pad(it):
    tokenizer = it.pipeline.text.clips[0][0]
    it.patch.setitem(tokenizer._ids, "pad", tokenizer.start_token)


def clips_swapped(it):
    def cat(tensors, dim=0):
        return torch.cat(tensors[::-1] if dim == -1 else tensors, dim=dim)

    it.patch.setattr(sampler.conditioning, "torch", SimpleNamespace(cat=cat))


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
    return lambda it: it.patch.setattr(mmdit.blocks, "modulate", lambda x, shift, scale: formula(
        x, shift, scale, lambda x, eps=1e-6: F.layer_norm(x, x.shape[-1:], eps=eps)))


def no_norm_of_q(it):
    it.model.dual_blocks[0].attention.context.norm_q = nn.Identity()


def attention(**how):
    return lambda it: it.functional(mmdit.attention, scaled_dot_product_attention=lambda q, k, v: SDPA(q, k, v, **how))


def exact_gelu(it):
    for_all([it.model], nn.GELU, "approximate", "none")


def no_gate(it):
    it.patch.setattr(mmdit.blocks.Stream, "finish", lambda self, tokens, shift, scale, gate:
                     tokens + self.mlp(mmdit.blocks.modulate(tokens, shift, scale)))


def no_normalization(it):
    for module in (porting.recording, repulsion.kernel):
        it.patch.setattr(module, "cosine_kernel", lambda vectors: vectors @ vectors.mT)


def no_epsilon(it):
    for module in (porting.recording, repulsion.solvers):
        it.patch.setattr(module, "density_matrix", lambda kernel, reg: kernel / kernel.shape[-1])


def downhill(it):
    up = OBJECTIVES["vendi"]
    it.patch.setitem(OBJECTIVES, "vendi", lambda density: -up(density))


def pushed(change):
    return lambda it: it.wrapped(repulsion.config, "repel", change)


def other_repulsion(**settings):
    def plant(it):
        it.run = replace(it.run, repulsion=replace(it.run.repulsion, **settings))

    return plant


def weight(change):
    return lambda it: it.patch.setattr(Watch, "weight", lambda self, w, sigma: change(w))


def uphill(it):
    own = sampler.pipeline.euler
    it.patch.setattr(sampler.pipeline, "euler", lambda velocity, *rest: own(lambda *x: -velocity(*x), *rest))


def decoded(**config):
    def plant(it):
        own = it.autoencoder.config
        it.autoencoder.config = replace(own, **{name: change(own) for name, change in config.items()})

    return plant


def cut_off(it):
    def to_picture(pixels):
        return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).byte().movedim(0, -1).numpy())

    it.patch.setattr(sampler.pipeline, "to_picture", to_picture)


FOUND = "found: "  # the mistake is told by its result; otherwise it stands among the usual causes

DEFECTS = {
    "pad token": (other_pad, "clip_l.ids", FOUND + "another pad token"),
    "no causal mask in CLIP": (
        lambda it: it.functional(mmdit.clip, scaled_dot_product_attention=lambda q, k, v, is_causal: SDPA(q, k, v)),
        "clip_l.penultimate", "no causal mask"),
    "CLIP-G's activation": (
        lambda it: for_all(it.clips[1:], mmdit.clip.ClipMLP, "activation", mmdit.clip.quick_gelu),
        "clip_g.penultimate", "the activation"),
    "CLIP's eps": (lambda it: for_all(it.clips, nn.LayerNorm, "eps", 1e-6), "clip_l.penultimate", "eps (1e-5)"),
    "CLIP pooled at another token": (
        lambda it: setattr(it.clips[0], "config", replace(it.clips[0].config, end_token=642)),
        "clip_l.pooled", "the first end token"),
    "scores of T5 divided": (
        lambda it: it.functional(mmdit.t5, scaled_dot_product_attention=lambda q, k, v, attn_mask, scale:
                                 SDPA(q, k, v, attn_mask=attn_mask)),
        "t5.states", "T5 does not divide"),
    "exact GELU in T5": (lambda it: it.functional(mmdit.t5, gelu=lambda x, approximate: F.gelu(x)), "t5.states",
                         "exact GELU"),
    "CLIPs in the other order": (clips_swapped, "context", "the CLIPs in the other order"),
    "other noise": (lambda it: setattr(it, "run", replace(it.run, seed=1)), "noise", "take the kit's"),
    "σ for 1000 σ": (rescaled, "time_in.in", FOUND + "σ for 1000 σ"),
    "sines first": (time_features(lambda found, _: found.roll(128, -1)), "time_in.in", FOUND + "sines before cosines"),
    "patches as (p q c)": (
        lambda it: it.pattern(mmdit.model, "-> b (rows columns) (c p q)", "-> b (rows columns) (p q c)"),
        "image_in.in", FOUND + "a patch's numbers as (p q c)"),
    "table from its corner": (table_from_its_corner, "dual.0.image.in", "cropped from its corner"),
    "scale and shift swapped": (modulation(lambda x, shift, scale, norm: (1 + shift) * norm(x) + scale),
                                "dual.0.attention.context.in", FOUND + "shift and scale swapped"),
    "scale for 1 + scale": (modulation(lambda x, shift, scale, norm: scale * norm(x) + shift),
                            "dual.0.attention.context.in", FOUND + "scale for 1 + scale"),
    "LayerNorm's eps": (modulation(lambda x, shift, scale, norm: (1 + scale) * norm(x, 1e-4) + shift),
                        "dual.0.attention.image.in", "LayerNorm's eps"),
    "heads transposed": (lambda it: it.pattern(mmdit.attention, "(three h k)", "(three k h)"),
                         "dual.0.attention.v", FOUND + "heads as (k h)"),
    "q, k, v inside the heads": (lambda it: it.pattern(mmdit.attention, "(three h k)", "(h three k)"),
                                 "dual.0.attention.v", "rows in another order"),
    "q not normalized": (no_norm_of_q, "dual.0.attention.q", "the norm: left out"),
    "no 1/√k": (attention(scale=1.0), "dual.0.attention.attended", FOUND + "no 1/√k"),
    "causal": (attention(is_causal=True), "dual.0.attention.attended", FOUND + "a causal mask"),
    "heads joined as (k h)": (lambda it: it.pattern(mmdit.attention, "-> b n (h k)", "-> b n (k h)"),
                              "dual.0.attention.context.out", "heads joined as (k h)"),
    "exact GELU": (exact_gelu, "dual.0.image.mlp.activation.out", FOUND + "exact GELU"),
    "no gate": (no_gate, "dual.0.image.out", FOUND + "no gate after the MLP"),
    "kernel not normalized": (no_normalization, "dual.0.repulsion.kernel", FOUND + "not normalized"),
    "no ε in the kernel": (no_epsilon, "dual.0.repulsion.spectrum", FOUND + "no ε"),
    "entropy falls": (downhill, "dual.0.repulsion.gradient", FOUND + "the other sign"),
    "one iteration": (other_repulsion(iterations=1), "dual.0.repulsion.mixing", "another number of steps"),
    "not pushed": (pushed(lambda found, tokens, *_: tokens.clone()), "dual.0.repulsion.out", FOUND + "not pushed"),
    "pushed together": (pushed(lambda found, tokens, *_: 2 * tokens - found), "dual.0.repulsion.out",
                        FOUND + "pushed together"),
    "all branches pushed": (other_repulsion(branches="all"), "dual.0.repulsion.gram",
                            "shape (2, 2, 2), expected (1, 2, 2)"),
    "repulsion in one block": (other_repulsion(blocks=(0,)), "dual.7.context.in", "repulsion in another block"),
    "last modulation as on the hub": (lambda it: edited(it.model.final_modulation, lambda rows: rows.roll(128, 0)),
                                      "final_modulation", FOUND + "scale before shift"),
    "rows of the last layer as in SD3's files": (
        lambda it: edited(it.model.image_out, lambda rows: rearrange(rows, "(c p q) ... -> (p q c) ...", p=2, q=2)),
        "image_out.out", FOUND + "rows as (p q c)"),
    "velocity of other patches": (lambda it: it.pattern(mmdit.model, "b (rows columns) (c p q) ->",
                                                        "b (rows columns) (p q c) ->"),
                                  "velocity.unconditional", FOUND + "a patch's numbers taken as (p q c)"),
    "guidance the wrong way": (weight(lambda w: 1 - w), "velocity.guided", FOUND + "the branches swapped"),
    "guidance from the conditional": (weight(lambda w: 1 + w), "velocity.guided",
                                      FOUND + "counted from the conditional"),
    "Euler the wrong way": (uphill, "latent.1", FOUND + "a step the wrong way"),
    "shift subtracted": (decoded(shift=lambda own: -own.shift), "decoder.in", FOUND + "the shift subtracted"),
    "scaling multiplied": (decoded(scaling=lambda own: 1 / own.scaling), "decoder.in",
                           FOUND + "multiplied with the scaling"),
    "eps of the decoder": (lambda it: for_all([it.autoencoder], nn.GroupNorm, "eps", 1e-3), "image", "eps is 1e-6"),
    "blue, green, red": (lambda it: edited(it.autoencoder.decoder.conv_out, lambda rows: rows.flip(0)), "image",
                         FOUND + "channels as blue, green, red"),
    "pixels cut off": (cut_off, "pixels", FOUND + "cut off"),
}


def assert_named(kit, broken, plant, name, words):
    plant(broken)
    rows = compare(kit, record(broken.pipeline, broken.run))
    said = report(rows)
    assert f"first deviation: {name}, in stage" in said, next((row for row in rows if row.passed is False), "none")
    after = said.split("first deviation: ")[1].split("also found")[0]
    assert words in after, after
    assert words.startswith(FOUND) == ("found: " in after), after


@pytest.mark.parametrize(("plant", "name", "words"), DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_is_named(kit, pipeline, monkeypatch, plant, name, words):
    assert_named(kit, Broken(pipeline, kit.run, monkeypatch), plant, name, words)


def rotation(change):
    return lambda it: it.wrapped(mmdit.attention, "rotate", change)


def half_split(found, x, angles):
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rows_and_columns_swapped(it):
    own = mmdit.model.rope_angles
    it.patch.setattr(mmdit.model, "rope_angles", lambda positions, *rest: own(positions[:, [0, 2, 1]], *rest))


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

    it.patch.setattr(mmdit.model, "torch", SimpleNamespace(cat=cat, zeros=torch.zeros, float64=torch.float64))


FLUX_DEFECTS = {
    "no shift": (lambda it: it.patch.setattr(it.pipeline, "shift", 1.0), "sigmas", FOUND + "σ not shifted"),
    "RoPE in halves": (rotation(half_split), "dual.0.attention.q", FOUND + "RoPE: pairs (j, j + k/2)"),
    "RoPE the other way": (rotation(lambda found, x, angles: mmdit.position.rotate(x, -angles)), "dual.0.attention.q",
                           FOUND + "RoPE: turned the other way"),
    "no RoPE": (rotation(lambda found, x, angles: x), "dual.0.attention.q", FOUND + "RoPE: not turned"),
    "rows and columns swapped": (rows_and_columns_swapped, "dual.0.angles.in", "rows and columns swapped"),
    "guidance for 1000 · guidance": (guidance_in_ones, "guidance_in.in", FOUND + "σ for 1000 σ"),
    "image before context": (image_first, "single.0.tokens.in", FOUND + "the image's tokens before the context's"),
    "exact GELU in single-stream blocks": (exact_gelu_in_single_blocks, "single.0.activation.out",
                                           FOUND + "exact GELU"),
    "activation before attention": (activation_first, "single.0.linear_out.in",
                                    FOUND + "the activation before the attention"),
    "repulsion in two steps": (other_repulsion(steps=2), "latent.2", "repulsion in other steps: it acts in 0 … 0"),
}


@pytest.mark.parametrize(("plant", "name", "words"), FLUX_DEFECTS.values(), ids=FLUX_DEFECTS)
def test_a_defect_planted_in_flux_is_named(flux_kit, flux_pipeline, monkeypatch, plant, name, words):
    assert_named(flux_kit, Broken(flux_pipeline, flux_kit.run, monkeypatch), plant, name, words)
