"""Repulsion in diffusers' pipelines: every velocity is ours with the same weights, FLUX.2's and references included."""

from dataclasses import replace

import diffusers
import pytest
import torch
from einops import rearrange
from small_pipelines import flux, photo, randomize, sd3

import weights
from examples.diffusers_repulsion import repelling
from repulsion import Repulsion

# float32 on both sides, sums in other orders, a few blocks: 2.5e-7 was measured; the least effect of a push is 1e-3
EQUAL, OTHER = 1e-5, 3e-4


def flux2(kind, **config):
    """A small random FLUX.2 pipeline without a text encoder."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
        block_out_channels=[4, 4, 4, 8], latent_channels=2, norm_num_groups=4)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 8, 12, 8), guidance_embeds=kind is diffusers.Flux2Pipeline)
    return kind(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
                text_encoder=None, tokenizer=None, transformer=randomize(transformer), **config)


def embeds(*prompts):
    """What stands for the context of the prompts: (prompts, 5, 24)."""
    return torch.stack([torch.randn(5, 24, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts])


def recorded(pipe, **call):
    """What the transformer was given and returned, call by call, in three steps of pictures of 4 × 6 patches."""
    calls, patch = [], 8 if isinstance(pipe, diffusers.FluxPipeline | diffusers.FluxKontextPipeline) else 16
    handle = pipe.transformer.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "height": 4 * patch, "width": 6 * patch, "output_type": "latent",
            "generator": torch.manual_seed(0)} | call
    try:
        pipe(**call)
    finally:
        handle.remove()
    return calls


def our_velocity(model, given, references, **repulsion):
    """Ours, for what diffusers gives its transformer; pictures of 4 × 6 patches, references of others."""
    p, sizes = model.config.patch_size, [(4, 6), *references]
    tokens = given["hidden_states"].split([y * x for y, x in sizes], dim=1)
    latent, *references = (rearrange(part, "b (y x) (c p q) -> b c (y p) (x q)", y=y, p=p, q=p)
                           for part, (y, x) in zip(tokens, sizes, strict=True))
    velocity = model(latent, given["timestep"], given["encoder_hidden_states"], given.get("pooled_projections"),
                     given.get("guidance"), references, **repulsion)
    return rearrange(velocity, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)


def difference(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


TWO = {"prompt": ["a circle", "a green star"], "max_sequence_length": 24}
CASES = {
    "FLUX.1-dev, true guidance": (flux, TWO | {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}, 2, []),
    "FLUX.1-schnell": (lambda: flux(guidance=False), TWO, 1, []),
    "FLUX.2-klein": (lambda: flux2(diffusers.Flux2KleinPipeline, is_distilled=True),
                     {"prompt_embeds": embeds("a", "b")}, 1, []),
    "FLUX.2-klein-base": (lambda: flux2(diffusers.Flux2KleinPipeline),
                          {"prompt_embeds": embeds("a", "b"), "negative_prompt_embeds": embeds("", "")}, 2, []),
    "FLUX.2-klein-base, references": (
        lambda: flux2(diffusers.Flux2KleinPipeline),
        {"prompt_embeds": embeds("a", "b"), "negative_prompt_embeds": embeds("", ""),
         "image": [photo(96, 64), photo(64, 80)]}, 2, [(4, 6), (5, 4)]),
    "FLUX.2-dev": (lambda: flux2(diffusers.Flux2Pipeline),
                   {"prompt_embeds": embeds("a", "b"), "guidance_scale": 3.0}, 1, []),
    "FLUX.2-dev, a reference": (lambda: flux2(diffusers.Flux2Pipeline),
                                {"prompt_embeds": embeds("a", "b"), "image": photo(96, 64)}, 1, [(4, 6)]),
}  # fmt: skip


@pytest.mark.parametrize("settings", [
    {}, {"branches": "conditional", "start": 1, "blocks": (0, 3), "iterations": 3},
    {"single_stream_tokens": "context", "blocks": "middle", "strength": 4.0}, {"single_stream_tokens": "none"},
    {"until": 0.6},
], ids=lambda settings: ", ".join(settings) or "defaults")  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_every_velocity_is_ours_with_the_same_weights(tmp_path, case, settings):
    build, call, branches, references = CASES[case]
    pipe, repulsion = build(), Repulsion(**{"strength": 1.0, "steps": 1} | settings)
    pipe.transformer.save_pretrained(tmp_path)
    model = weights.load_transformer(tmp_path)
    with repelling(pipe, repulsion):
        calls = recorded(pipe, num_images_per_prompt=2, **call)
    assert len(calls) == 3 * branches
    for i, (given, found) in enumerate(calls):
        step, conditional = i // branches, i % branches == 0
        assert difference(*given["encoder_hidden_states"][1:3]) > 0.1 or not conditional  # of two prompts
        found, typical = found[:, :24], our_velocity(model, given, references)  # without the references' tokens
        if repulsion.acts_at(step, given["timestep"][0].item()) and (conditional or repulsion.branches == "all"):
            pushed = replace(repulsion, branches="all")
            assert difference(found, our_velocity(model, given, references, repulsion=pushed, groups=2)) < EQUAL
            assert difference(found, typical) > OTHER
        else:
            assert difference(found, typical) < EQUAL


def test_kontext_reads_its_reference_and_repels(tmp_path):
    pipe = flux(diffusers.FluxKontextPipeline, levels=5, blocks=1)
    pipe.transformer.save_pretrained(tmp_path)
    model = weights.load_transformer(tmp_path)
    call = {"prompt": "a circle", "image": photo(64, 64), "height": 128, "width": 192, "max_area": 128 * 192,
            "max_sequence_length": 24, "num_images_per_prompt": 2, "_auto_resize": False}
    with repelling(pipe, Repulsion(strength=1.0)):
        calls = recorded(pipe, **call)
    for step, (given, found) in enumerate(calls):
        found, typical = found[:, :24], our_velocity(model, given, [(2, 2)])
        pushed = our_velocity(model, given, [(2, 2)], repulsion=Repulsion(strength=1.0))
        assert difference(found, typical if step else pushed) < EQUAL < OTHER < difference(pushed, typical)


def test_sd3_5_medium_repels_in_the_first_of_its_two_attentions(tmp_path):
    pipe = sd3("rms_norm", (0, 1))
    pipe.transformer.save_pretrained(tmp_path)
    model = weights.load_transformer(tmp_path)
    with repelling(pipe, Repulsion(strength=1.0)):
        calls = recorded(pipe, num_images_per_prompt=2, **TWO | {"height": 32, "width": 48})
    (given, found), (later, typical), _ = calls
    inputs = [[x["hidden_states"], x["timestep"] / 1000, x["encoder_hidden_states"], x["pooled_projections"]]
              for x in (given, later)]
    assert difference(found, model(*inputs[0], repulsion=Repulsion(strength=1.0), groups=4)) < EQUAL
    assert difference(found, model(*inputs[0])) > OTHER
    assert difference(typical, model(*inputs[1])) < EQUAL
