"""Usual mistakes planted in our own model: the checker names the tensor and, where the result shows it, the mistake."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torch.nn import functional as F

import mmdit.attention
import mmdit.blocks
import mmdit.clip
import mmdit.layers
import mmdit.model
import mmdit.t5
import porting.recording
import repulsion.config
import repulsion.solvers
import sampler.conditioning
import sampler.pipeline
from porting import compare, record, report
from repulsion.objectives import OBJECTIVES
from sampler.schedule import Schedule

SDPA = F.scaled_dot_product_attention


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


def other_pad(it):
    tokenizer = it.pipeline.text.clips[0][0]
    it.patch.setattr(tokenizer, "pad_token", tokenizer.start_token)


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


def no_normalization(it):
    it.patch.setattr(porting.recording, "cosine_kernel", lambda vectors: vectors @ vectors.mT)


def no_epsilon(it):
    for module in (porting.recording, repulsion.solvers):
        it.patch.setattr(module, "density_matrix", lambda kernel, identity, reg: kernel / len(identity))


def downhill(it):
    it.patch.setitem(OBJECTIVES, "vendi", tuple(lambda density, up=up: -up(density) for up in OBJECTIVES["vendi"]))


def norm(x):
    return np.sqrt(np.trace(x, axis1=1, axis2=2))[:, None, None]


def strength(s, gram, moved):
    """The length of a step as it should be; `moved` are the inner products of its direction."""
    return s * norm(gram) / norm(moved)


def steps(length, anew=True):
    """Steps of another length than `strength`, or all along the first gradient."""

    def mixing_matrix(gram, s, scale, iterations, objective, reg):
        identity = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
        pushed = identity
        for _ in range(iterations):
            at = pushed if anew else identity
            direction = repulsion.solvers.gradient_matrix(at @ gram @ at.swapaxes(1, 2), objective, reg) @ at
            moved = direction @ gram @ direction.swapaxes(1, 2)
            pushed = pushed + length(s / iterations, gram, moved) * direction
        return pushed - identity, np.inf

    def plant(it):
        for module in ("repulsion.repel", "repulsion.solvers"):
            it.patch.setattr(importlib.import_module(module), "mixing_matrix", mixing_matrix)

    return plant


def of_each_sample(s, gram, moved):
    return s * np.sqrt(np.diagonal(gram, axis1=1, axis2=2) / np.diagonal(moved, axis1=1, axis2=2))[..., None]


def of_one_sample(s, gram, moved):
    return s * np.sqrt(np.diagonal(gram, axis1=1, axis2=2).mean(1))[:, None, None] / norm(moved)


def of_the_batch(s, gram, moved):
    return s * np.linalg.norm(norm(gram)) / np.linalg.norm(norm(moved))


def pushed(change):
    return lambda it: it.wrapped(repulsion.config, "repel", change)


def other_repulsion(**settings):
    def plant(it):
        it.run = replace(it.run, repulsion=replace(it.run.repulsion, **settings))

    return plant


def weight(change):
    return lambda it: it.wrapped(sampler.pipeline, "GuidedVelocity",
                                 lambda found, *_: replace(found, weight=change(found.weight)))


def uphill(it):
    own = porting.recording.denoise
    it.patch.setattr(porting.recording, "denoise", lambda velocity, *rest: own(lambda *x: -velocity(*x), *rest))


def decoded(**config):
    def plant(it):
        own = it.autoencoder.config
        it.autoencoder.config = replace(own, **{name: change(own) for name, change in config.items()})

    return plant


def truncated(it):
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
        lambda it: for_all(it.clips[1:], mmdit.layers.MLP, "activation", mmdit.clip.quick_gelu),
        "clip_g.penultimate", "the activation"),
    "CLIP's eps": (lambda it: for_all(it.clips, nn.LayerNorm, "eps", 1e-6), "clip_l.penultimate", "eps (1e-5)"),
    "CLIP pooled at another token": (
        lambda it: setattr(it.clips[0], "config", replace(it.clips[0].config, end_token=642)),
        "clip_l.pooled", "the first end token"),
    "scores of T5 divided": (
        lambda it: it.functional(mmdit.t5, scaled_dot_product_attention=lambda q, k, v, attn_mask, scale:
                                 SDPA(q, k, v, attn_mask=attn_mask)),
        "t5.states", "T5 does not divide"),
    "exact GELU in T5": (
        lambda it: for_all([it.pipeline.text.t5[1].module], mmdit.layers.GatedMLP, "activation", F.gelu),
        "t5.states", "exact GELU"),
    "CLIPs in the other order": (clips_swapped, "context", "the CLIPs in the other order"),
    "other noise": (lambda it: setattr(it, "run", replace(it.run, seed=1)), "noise", "take the kit's"),
    "σ for 1000 σ": (rescaled, "time_in.in", FOUND + "σ for 1000 σ"),
    "sines first": (time_features(lambda found, _: found.roll(128, -1)), "time_in.in", FOUND + "sines before cosines"),
    "patches as (p q c)": (
        lambda it: it.pattern(mmdit.model, "-> b (rows columns) (c p q)", "-> b (rows columns) (p q c)"),
        "image_in.in", FOUND + "a patch's values as (p q c)"),
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
                              "dual.0.repulsion.in", "heads joined as (k h)"),
    "exact GELU": (exact_gelu, "dual.0.image.mlp.activation.out", FOUND + "exact GELU"),
    "no gate": (no_gate, "dual.0.image.out", FOUND + "no gate after the MLP"),
    "kernel not normalized": (no_normalization, "dual.0.repulsion.kernel", FOUND + "not normalized"),
    "no ε in the kernel": (no_epsilon, "dual.0.repulsion.spectrum", FOUND + "no ε"),
    "entropy falls": (downhill, "dual.0.repulsion.gradient", FOUND + "the other sign"),
    "two iterations": (other_repulsion(iterations=2), "dual.0.repulsion.mixing", "another number of steps: it is 3"),
    "another strength": (other_repulsion(strength=2.0), "dual.0.repulsion.mixing", "in each group, s = 1.5"),
    "gradient not normalized": (steps(lambda s, gram, moved: s), "dual.0.repulsion.mixing",
                                FOUND + "the gradient not normalized"),
    "one gradient": (steps(strength, anew=False), "dual.0.repulsion.mixing", FOUND + "all steps along the first"),
    "strength not divided": (steps(lambda s, *x: 3 * strength(s, *x)), "dual.0.repulsion.mixing",
                             FOUND + "each step s: it is s / M"),
    "length of each sample": (steps(of_each_sample), "dual.0.repulsion.mixing", FOUND + "both norms of each sample"),
    "length of one sample": (steps(of_one_sample), "dual.0.repulsion.mixing", FOUND + "‖C‖ of one sample"),
    "length of the batch": (steps(of_the_batch), "dual.0.repulsion.mixing", FOUND + "both norms of the whole batch"),
    "not pushed": (pushed(lambda found, tokens, *_: tokens.clone()), "dual.0.repulsion.out", FOUND + "not pushed"),
    "pushed together": (pushed(lambda found, tokens, *_: 2 * tokens - found), "dual.0.repulsion.out",
                        FOUND + "pushed together"),
    "one branch pushed": (other_repulsion(branches="conditional"), "dual.0.repulsion.gram",
                          "shape (1, 2, 2), expected (2, 2, 2)"),
    "repulsion in one block": (other_repulsion(blocks=(0,)), "dual.7.context.in", "repulsion in another block"),
    "last modulation as on the hub": (lambda it: edited(it.model.final_modulation, lambda rows: rows.roll(128, 0)),
                                      "final_modulation", FOUND + "scale before shift"),
    "rows of the last layer as in SD3's files": (
        lambda it: edited(it.model.image_out, lambda rows: rearrange(rows, "(c p q) ... -> (p q c) ...", p=2, q=2)),
        "image_out.out", FOUND + "rows as (p q c)"),
    "velocity of other patches": (lambda it: it.pattern(mmdit.model, "b (rows columns) (c p q) ->",
                                                        "b (rows columns) (p q c) ->"),
                                  "velocity.unconditional", FOUND + "a patch's values taken as (p q c)"),
    "guidance the wrong way": (weight(lambda w: 1 - w), "velocity.guided", FOUND + "the branches swapped"),
    "guidance from the conditional": (weight(lambda w: 1 + w), "velocity.guided",
                                      FOUND + "added to the conditional"),
    "Euler the wrong way": (uphill, "latent.1", FOUND + "a step the wrong way"),
    "shift subtracted": (decoded(shift=lambda own: -own.shift), "decoder.in", FOUND + "the shift subtracted"),
    "scaling multiplied": (decoded(scaling=lambda own: 1 / own.scaling), "decoder.in",
                           FOUND + "multiplied with the scaling"),
    "eps of the decoder": (lambda it: for_all([it.autoencoder], nn.GroupNorm, "eps", 1e-3), "image", "eps is 1e-6"),
    "blue, green, red": (lambda it: edited(it.autoencoder.decoder.conv_out, lambda rows: rows.flip(0)), "image",
                         FOUND + "channels as blue, green, red"),
    "pixels truncated": (truncated, "pixels", FOUND + "truncated"),
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


def test_steps_as_they_should_be_deviate_nowhere(kit, pipeline, monkeypatch):
    broken = Broken(pipeline, kit.run, monkeypatch)
    steps(strength)(broken)
    assert all(row.passed for row in compare(kit, record(pipeline, kit.run)))


def rotation(change):
    return lambda it: it.wrapped(mmdit.attention, "rotate", change)


def half_split(found, x, rope):
    (cos, sin), (first, second) = rope, x.chunk(2, dim=-1)
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

    it.patch.setattr(mmdit.model, "torch", SimpleNamespace(**vars(torch) | {"cat": cat}))


FLUX_DEFECTS = {
    "no shift": (lambda it: it.patch.setattr(it.pipeline, "schedule", Schedule("flux")), "sigmas",
                 FOUND + "σ not shifted"),
    "RoPE in halves": (rotation(half_split), "dual.0.attention.q", FOUND + "RoPE: pairs (j, j + k/2)"),
    "RoPE the other way": (rotation(lambda found, x, rope: mmdit.position.rotate(x, torch.stack([rope[0], -rope[1]]))),
                           "dual.0.attention.q", FOUND + "RoPE: rotated the other way"),
    "no RoPE": (rotation(lambda found, x, rope: x), "dual.0.attention.q", FOUND + "RoPE: not rotated"),
    "rows and columns swapped": (rows_and_columns_swapped, "dual.0.rope.in", "rows and columns swapped"),
    "sin before cos": (lambda it: it.wrapped(mmdit.model.MMDiT, "rope", lambda found, *_: found.flip(0)),
                       "dual.0.rope.in", FOUND + "sin before cos"),
    "guidance for 1000 · guidance": (guidance_in_ones, "guidance_in.in", FOUND + "σ for 1000 σ"),
    "image before context": (image_first, "single.0.tokens.in", FOUND + "the image's tokens before the context's"),
    "exact GELU in single-stream blocks": (exact_gelu_in_single_blocks, "single.0.activation.out",
                                           FOUND + "exact GELU"),
    "activation before attention": (activation_first, "single.0.linear_out.in",
                                    FOUND + "the activation before the attention"),
    "η not divided": (other_repulsion(scale=300.0), "dual.0.repulsion.mixing", FOUND + "each step η: it is η / M"),
    "one gradient": (other_repulsion(iterations=1), "dual.0.repulsion.mixing", FOUND + "all steps along the first"),
    "repulsion in two steps": (other_repulsion(steps=2), "latent.2", "repulsion in other steps: it acts in 0 … 0"),
}


@pytest.mark.parametrize(("plant", "name", "words"), FLUX_DEFECTS.values(), ids=FLUX_DEFECTS)
def test_a_defect_planted_in_flux_is_named(flux_kit, flux_pipeline, monkeypatch, plant, name, words):
    assert_named(flux_kit, Broken(flux_pipeline, flux_kit.run, monkeypatch), plant, name, words)
