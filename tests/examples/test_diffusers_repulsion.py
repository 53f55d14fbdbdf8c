"""Repulsion in diffusers' pipelines against ours: whole pictures, and every call of the transformer."""

import ast
import re
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from small_pipelines import assert_other_pictures, assert_same_pictures, flux, pixels, randomize, sd3

import examples.diffusers_repulsion
import weights
from examples.diffusers_repulsion import repelling
from repulsion import Repulsion
from sampler import Pipeline, SkipLayerGuidance, starting_noise

KINDS = {"tiny-sd3": diffusers.StableDiffusion3Pipeline, "tiny-flux": diffusers.FluxPipeline,
         "tiny-turbo": diffusers.StableDiffusion3Pipeline}
NOISE = starting_noise(3, 4, (6, 16, 16))
STRONG = Repulsion(strength=1.0, steps=2)
# float32 on both sides, sums in other orders, a few blocks: 2.5e-7 was measured; the least effect of a push is 1e-3
EQUAL, OTHER = 1e-5, 3e-4


def packed(latent):
    return rearrange(latent, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)


@pytest.fixture(scope="module")
def theirs():
    """diffusers' pipelines of the bundled checkpoints, by name."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = KINDS[name].from_pretrained(weights.BUNDLED[name], dtype=torch.float32)
            loaded[name].set_progress_bar_config(disable=True)
        return loaded[name]

    return load


def paint(pipe, prompt="a circle", noise=NOISE, **call):
    """With diffusers: the pictures of one prompt, or of several, which share the noise in equal parts."""
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    latents = packed(noise) if isinstance(pipe, diffusers.FluxPipeline) else noise
    call = {"num_inference_steps": 4, "height": 64, "width": 64, "max_sequence_length": 24} | call
    return pipe(prompt, num_images_per_prompt=len(noise) // prompts, latents=latents, **call).images


# ---- the bundled checkpoints: the same pictures as ours


@pytest.mark.parametrize("name", KINDS)
def test_it_paints_what_ours_paint_with_their_own_repulsion(theirs, name):
    ours = Pipeline.load(name)
    call = {"noise": NOISE, "steps": min(ours.defaults.steps, 8)}
    with repelling(theirs(name), ours.defaults.repulsion):
        found = paint(theirs(name), num_inference_steps=call["steps"], guidance_scale=ours.defaults.guidance or 0.0)
    assert_same_pictures(found, ours("a circle", 4, **call, repulsion=ours.defaults.repulsion))
    assert_other_pictures(found, ours("a circle", 4, **call))


@pytest.mark.parametrize("settings", [
    {"blocks": (0, 5), "start": 1}, {"branches": "conditional", "iterations": 3, "blocks": "last"},
    {"strength": None, "scale": 3e5, "objective": "dpp"}, {"single_stream_tokens": "none", "start": 3},
], ids=lambda settings: ", ".join(settings))  # fmt: skip
@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_every_setting_acts_as_in_ours(theirs, name, settings):
    repulsion = replace(STRONG, **settings)
    guidance = {"guidance_scale": 3.0}
    if name == "tiny-flux":
        guidance |= {"negative_prompt": "a star", "true_cfg_scale": 2.0}
    with repelling(theirs(name), repulsion):
        found = paint(theirs(name), noise=NOISE[:3], **guidance)
    ours = Pipeline.load(name)
    call = {"noise": NOISE[:3], "steps": 4, "guidance": 3.0}
    if name == "tiny-flux":
        call |= {"negative_prompt": "a star", "true_guidance": 2.0}
    assert_same_pictures(found, ours("a circle", 3, **call, repulsion=repulsion))
    assert pixels(ours("a circle", 3, **call)).tolist() != pixels(found).tolist()


@pytest.mark.parametrize("branches", ["all", "conditional"])
@pytest.mark.parametrize("name,guidance", [
    ("tiny-sd3", {"guidance_scale": 3.0}), ("tiny-flux", {"true_cfg_scale": 2.0}),
], ids=["tiny-sd3", "tiny-flux"])  # fmt: skip
def test_two_prompts_in_a_batch_repel_their_own_pictures_only(theirs, name, guidance, branches):
    pipe, prompts = theirs(name), ["a circle", "a green star"]
    with repelling(pipe, replace(STRONG, branches=branches)):
        together = paint(pipe, prompts, negative_prompt=["", ""], **guidance)
        alone = [paint(pipe, prompt, noise, negative_prompt="", **guidance)
                 for prompt, noise in zip(prompts, NOISE.split(2), strict=True)]
    assert_same_pictures(together, alone[0] + alone[1])
    assert_other_pictures(together, paint(pipe, prompts, negative_prompt=["", ""], **guidance))


def test_a_prompt_that_is_repeated_is_one_group(theirs):
    with repelling(theirs("tiny-turbo"), STRONG):
        found = paint(theirs("tiny-turbo"), ["a circle"] * 4, guidance_scale=0.0)
        assert_same_pictures(found, paint(theirs("tiny-turbo"), guidance_scale=0.0))


def test_skip_layer_guidance_repels_in_its_own_branch_too(theirs):
    repulsion = Repulsion(strength=1.0, steps=4)
    with repelling(theirs("tiny-sd3"), repulsion):
        found = paint(theirs("tiny-sd3"), guidance_scale=3.0, skip_guidance_layers=[1, 2],
                      skip_layer_guidance_stop=0.9)
    ours, skip = Pipeline.load("tiny-sd3"), SkipLayerGuidance(layers=(1, 2), stop=0.9)
    call = {"noise": NOISE, "steps": 4, "guidance": 3.0, "repulsion": repulsion}
    assert_same_pictures(found, ours("a circle", 4, **call, skip_layer_guidance=skip))
    assert_other_pictures(found, ours("a circle", 4, **call))


def test_steps_are_counted_anew_in_every_run_and_by_heun_in_pairs(theirs):
    pipe = theirs("tiny-turbo")
    with repelling(pipe, replace(STRONG, steps=1)):
        first, second = (paint(pipe, guidance_scale=0.0, num_inference_steps=1) for _ in range(2))
    assert (pixels(first) == pixels(second)).all()
    heun = diffusers.StableDiffusion3Pipeline(**pipe.components | {
        "scheduler": diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)})
    heun.set_progress_bar_config(disable=True)
    pushed = []
    for start in range(3):
        with repelling(heun, replace(STRONG, start=start, steps=1)):
            pushed.append(paint(heun, guidance_scale=0.0, num_inference_steps=3))
    base = paint(heun, guidance_scale=0.0, num_inference_steps=3)
    assert all(pixels(pictures).tolist() != pixels(base).tolist() for pictures in pushed)
    with repelling(heun, replace(STRONG, start=3)):
        assert (pixels(paint(heun, guidance_scale=0.0, num_inference_steps=3)) == pixels(base)).all()


# ---- every call of the transformer, against ours with the same weights


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


def gradient_picture(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


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
         "image": [gradient_picture(96, 64), gradient_picture(64, 80)]}, 2, [(4, 6), (5, 4)]),
    "FLUX.2-dev": (lambda: flux2(diffusers.Flux2Pipeline),
                   {"prompt_embeds": embeds("a", "b"), "guidance_scale": 3.0}, 1, []),
    "FLUX.2-dev, a reference": (lambda: flux2(diffusers.Flux2Pipeline),
                                {"prompt_embeds": embeds("a", "b"), "image": gradient_picture(96, 64)}, 1, [(4, 6)]),
}  # fmt: skip


@pytest.mark.parametrize("settings", [
    {}, {"branches": "conditional", "start": 1, "blocks": (0, 3), "iterations": 3},
    {"single_stream_tokens": "context", "blocks": "middle", "strength": 4.0}, {"single_stream_tokens": "none"},
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
        if repulsion.acts_at(step) and (conditional or repulsion.branches == "all"):
            pushed = replace(repulsion, branches="all")
            assert difference(found, our_velocity(model, given, references, repulsion=pushed, groups=2)) < EQUAL
            assert difference(found, typical) > OTHER
        else:
            assert difference(found, typical) < EQUAL


def test_kontext_reads_its_reference_and_repels(tmp_path):
    pipe = flux(diffusers.FluxKontextPipeline, levels=5, blocks=1)
    pipe.transformer.save_pretrained(tmp_path)
    model = weights.load_transformer(tmp_path)
    call = {"prompt": "a circle", "image": gradient_picture(64, 64), "height": 128, "width": 192, "max_area": 128 * 192,
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


# ---- what it leaves behind


def state(transformer):
    """Everything that a wrapper or a hook could be left in."""
    return [(name, {key: id(value) for key, value in vars(module).items() if not key.startswith("_is_hf")},
             *(len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")))
            for name, module in transformer.named_modules()]


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("raises", ["after a step", "in a block that repels", "behind the pipeline"])
@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
def test_an_exception_leaves_the_pipeline_as_it_was(theirs, name, raises, monkeypatch):
    pipe, call = theirs(name), {"noise": NOISE[:2], "num_inference_steps": 2}
    pictures, before = pixels(paint(pipe, **call)), state(pipe.transformer)
    callback = {"callback_on_step_end": interrupt} if raises == "after a step" else {}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), repelling(pipe, STRONG):
        assert state(pipe.transformer) != before
        if raises == "in a block that repels":
            patch.setattr("repulsion.config.repel", interrupt)
        paint(pipe, **call, **callback)
        interrupt()
    assert state(pipe.transformer) == before
    assert (pixels(paint(pipe, **call)) == pictures).all()


def test_one_within_another_pushes_twice_and_both_are_gone_afterwards(theirs):
    pipe, before = theirs("tiny-turbo"), state(theirs("tiny-turbo").transformer)
    first, last = replace(STRONG, blocks=(0, 1)), replace(STRONG, blocks=(5, 6))
    with repelling(pipe, first), repelling(pipe, last):
        nested = paint(pipe, guidance_scale=0.0)
    assert state(pipe.transformer) == before
    with repelling(pipe, replace(STRONG, blocks=(0, 1, 5, 6))):
        assert (pixels(paint(pipe, guidance_scale=0.0)) == pixels(nested)).all()


# ---- what it refuses


def refuses(pipe, message, call=None, repulsion=STRONG):
    with pytest.raises(ValueError, match=message), repelling(pipe, repulsion):
        paint(pipe, **call or {})


def test_pipelines_transformers_and_blocks_that_are_not_there_are_named(theirs):
    refuses(Pipeline.load("tiny-turbo"), "cannot repel in Pipeline with MMDiT: known are StableDiffusion3Pipeline")
    parts = theirs("tiny-turbo").components
    parts = {name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")}
    refuses(diffusers.StableDiffusion3PAGPipeline(**parts), "cannot repel in StableDiffusion3PAGPipeline with SD3Trans")
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.transformer = Pipeline.load("tiny-turbo").transformer
    refuses(pipe, "cannot repel in StableDiffusion3Pipeline with MMDiT: known are")
    refuses(theirs("tiny-sd3"), "repulsion in block 8, but this model's blocks end at 7",
            repulsion=Repulsion(strength=1.0, blocks=(8,)))


@pytest.mark.parametrize("call", [{"noise": NOISE[:1]}, {"prompt": ["a circle", "a star"], "noise": NOISE[:2]},
                                  {"prompt": ["a circle", "a circle", "a star"], "noise": NOISE[:3]}])
def test_a_prompt_with_one_picture_has_nothing_to_repel(theirs, call):
    refuses(theirs("tiny-sd3"), "a prompt has one picture, which nothing repels: pass num_images_per_prompt", call)


def test_attention_that_is_sharded_or_that_a_cache_reuses_or_skips_is_refused(theirs, monkeypatch):
    pipe = theirs("tiny-flux")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.transformer, "_parallel_config", object())
        refuses(pipe, "attention is reused or sharded: .* leave out enable_parallelism")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    try:
        refuses(pipe, r"attention is reused or sharded: call pipe.transformer.disable_cache\(\)")
        pipe.transformer._cache_config, config = None, pipe.transformer._cache_config  # as set up by its function
        refuses(pipe, r"blocks \[1, .*\] computed no attention in step 1, which repels")
        pipe.transformer._cache_config = config
    finally:
        pipe.transformer.disable_cache()


def test_a_transformer_that_is_replaced_or_compiled_within_it_is_refused(theirs):
    pipe = theirs("tiny-turbo")
    transformer, before = pipe.transformer, state(pipe.transformer)
    with pytest.raises(ValueError, match="replaced or compiled within `repelling`"), repelling(pipe, STRONG):
        pipe.transformer.compile()
    assert state(pipe.transformer) == before
    with pytest.raises(ValueError, match="replaced or compiled within `repelling`"), repelling(pipe, STRONG):
        pipe.transformer = theirs("tiny-sd3").transformer
    pipe.transformer = transformer


# ---- what it needs


def test_it_imports_torch_and_repulsion_alone_and_names_what_to_install():
    source = Path(examples.diffusers_repulsion.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
             for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"torch", "repulsion"}
    root = Path(examples.diffusers_repulsion.__file__).parents[1]
    pinned = re.findall(r"^([\w-]+)==", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (packages,) = re.findall(r"pip install -c constraints.txt -e \. (.*)", source)
    assert {"diffusers", "transformers"} < set(packages.split()) < set(pinned)


def test_the_readme_s_lines_paint_what_ours_paint(monkeypatch):
    root = Path(examples.diffusers_repulsion.__file__).parents[1]
    section = (root / "README.md").read_text(encoding="utf-8").split("## In your own pipeline")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(root)
    torch.manual_seed(0)
    names, quick = {}, "num_images_per_prompt=3, num_inference_steps=6"
    exec(code.replace("num_images_per_prompt=8", quick), names)
    noise, repulsion = torch.randn((3, 6, 16, 16), generator=torch.manual_seed(0)), Repulsion(strength=1.0, steps=4)
    wanted = Pipeline.load("tiny-sd3")("a circle", 3, noise=noise, steps=6, guidance=3.0, repulsion=repulsion)
    assert_same_pictures(names["pictures"], wanted)
