"""Repulsion in diffusers' pipelines paints what ours paint, leaves nothing behind, and refuses what it cannot do."""

import ast
import re
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from einops import rearrange
from small_pipelines import assert_other_pictures, assert_same_pictures, pixels

import examples.diffusers_repulsion
import weights
from examples.diffusers_repulsion import repelling
from repulsion import Repulsion
from sampler import Pipeline, SkipLayerGuidance, starting_noise

KINDS = {"tiny-sd3": diffusers.StableDiffusion3Pipeline, "tiny-flux": diffusers.FluxPipeline,
         "tiny-turbo": diffusers.StableDiffusion3Pipeline}
NOISE = starting_noise(3, 4, (16, 16, 16))
STRONG = Repulsion(strength=1.0, steps=2)


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
    call = {"num_inference_steps": 4, "height": 128, "width": 128, "max_sequence_length": 24} | call
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
    repulsion = Repulsion(strength=0.5, steps=4)
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
    exec(code.replace("num_images_per_prompt=8, num_inference_steps=20", quick), names)
    noise, repulsion = torch.randn((3, 16, 16, 16), generator=torch.manual_seed(0)), Repulsion(strength=0.5, steps=4)
    wanted = Pipeline.load("tiny-sd3")("a circle", 3, noise=noise, steps=6, guidance=6.0, repulsion=repulsion)
    assert_same_pictures(names["pictures"], wanted)
