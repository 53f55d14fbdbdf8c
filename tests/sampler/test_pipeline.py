"""The pipeline against diffusers on the shipped folder, and its promises: seeds, noise, groups, clear errors."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import weights
from mmdit import MMDiT
from repulsion import Repulsion
from sampler import Pipeline, starting_noise
from sampler.pipeline import to_picture

FOLDER = weights.BUNDLED["tiny-sd3"]


def pixels(pictures):
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


@pytest.fixture(scope="module")
def oracle():
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("prompt,guidance,steps", [
    ("a circle", 4.5, 20), ("a small green star left of a red ring on a checked teal ground", 4.5, 8),
    ("a square and a cross", 1.0, 8),
])  # fmt: skip
def test_diffusers_reads_the_folder_and_paints_the_same_pictures(pipeline, oracle, prompt, guidance, steps):
    noise = starting_noise(5, 3, (16, 16, 16))
    ours = pixels(pipeline(prompt, 3, noise=noise, steps=steps, guidance=guidance))
    theirs = oracle(prompt, num_images_per_prompt=3, latents=noise, num_inference_steps=steps, guidance_scale=guidance,
                    max_sequence_length=pipeline.text.t5_length).images
    assert np.abs(ours - pixels(theirs)).max() <= 2


def test_context_and_pooled_are_assembled_like_diffusers(pipeline, oracle):
    prompt = "a red circle and a blue square"
    context, pooled = pipeline.text(prompt)
    theirs = oracle.encode_prompt(prompt, None, None, do_classifier_free_guidance=False,
                                  max_sequence_length=pipeline.text.t5_length)
    for ours, expected in ((context, theirs[0]), (pooled, theirs[2])):
        # float32 through a few layers, other order of sums
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-5


def test_picture_i_is_the_same_in_every_batch(pipeline):
    eight = pixels(pipeline("a star", 8, seed=3, steps=6))
    for images in (1, 4):
        fewer = pixels(pipeline("a star", images, seed=3, steps=6))
        # float32 sums in another order may turn a value of x.5 the other way
        assert np.abs(fewer - eight[:images]).max() <= 1


def test_noise_replaces_the_seed(pipeline):
    noise = starting_noise(11, 2, (16, 16, 16))
    by_noise = pixels(pipeline("a ring", 2, seed=999, noise=noise, steps=4))
    assert (by_noise == pixels(pipeline("a ring", 2, seed=11, steps=4))).all()


def test_no_repulsion_a_scale_of_zero_and_no_steps_of_it_are_the_same(pipeline):
    base = pixels(pipeline("a ring", 3, steps=4))
    for nothing in (Repulsion(0.0, steps=4), Repulsion(scale=1e9, steps=0)):
        assert (pixels(pipeline("a ring", 3, steps=4, repulsion=nothing)) == base).all()


def test_repulsion_acts_in_its_steps_on_both_branches_as_groups(pipeline, monkeypatch):
    calls = []
    forward = MMDiT.forward

    def spy(self, **inputs):
        calls.append((len(inputs["latent"]), inputs["repulsion"], inputs["groups"]))
        return forward(self, **inputs)

    monkeypatch.setattr(MMDiT, "forward", spy)
    push = Repulsion(scale=1e3, iterations=2, steps=2)
    pipeline("a ring", 3, steps=5, repulsion=push)
    assert calls == [(6, push, 2)] * 2 + [(6, None, 2)] * 3
    calls.clear()
    pipeline("a ring", 3, steps=3, guidance=1.0, repulsion=push)
    assert calls == [(3, push, 1)] * 2 + [(3, None, 1)]
    calls.clear()
    late = replace(push, start=1)
    pipeline("a ring", 3, steps=4, guidance=1.0, repulsion=late)
    assert calls == [(3, None, 1)] + [(3, late, 1)] * 2 + [(3, None, 1)]


def test_guidance_is_the_classifier_free_formula(pipeline):
    # The velocity is affine in the guidance scale: one step from the same noise, three scales on a line.
    noise = starting_noise(0, 1, (16, 16, 16))
    latents = []
    decode = pipeline.autoencoder.decode
    pipeline.autoencoder.decode = lambda latent: latents.append(latent) or decode(latent)
    try:
        for guidance in (2.0, 4.0, 6.0, 1.0):
            pipeline("a star", 1, noise=noise, steps=1, guidance=guidance)
    finally:
        del pipeline.autoencoder.decode
    two, four, six, one = latents
    assert (four - two).abs().max() > 1e-2
    torch.testing.assert_close(six - four, four - two, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one, two - (four - two) / 2, rtol=1e-3, atol=1e-4)  # w = 1: the conditional alone


def test_negative_prompt_leads_away_from_what_it_names(pipeline):
    plain = pixels(pipeline("a circle", 4, steps=8))
    empty = pixels(pipeline("a circle", 4, steps=8, negative_prompt=""))
    other = pixels(pipeline("a circle", 4, steps=8, negative_prompt="a red circle"))
    assert (plain == empty).all() and np.abs(plain - other).max() > 50


def test_other_sizes_come_out_at_their_size(pipeline):
    (picture,) = pipeline("a star", 1, steps=2, height=48, width=96)
    assert picture.size == (96, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_paints_nearly_the_same(pipeline, dtype):
    half = Pipeline.load("tiny-sd3", dtype=dtype)
    dtypes = {name: next(part.module.parameters()).dtype for name, (_, part) in half.text.encoders.items()}
    assert dtypes == {"clip_l": dtype, "clip_g": dtype, "t5": torch.bfloat16}
    difference = np.abs(pixels(half("a circle", 2, steps=8)) - pixels(pipeline("a circle", 2, steps=8)))
    # bfloat16 keeps 8 bits: about 1 % of the range on average after 8 steps (float16: T5 alone is bfloat16)
    assert difference.mean() < 4


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, -1 + 2 / 255, 0.0, 1.0, 3.0]).reshape(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(to_picture(values))[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("call,message", [
    ({"prompt": ""}, "the prompt is empty"), ({"prompt": "  \n"}, "the prompt is empty"),
    ({"prompt": ["a star"]}, "the prompt must be one text, got a list"),
    ({"images": 0}, "images must be at least 1, got 0"), ({"steps": 0}, "steps must be at least 1"),
    ({"height": 60}, "height 60 is no multiple of 16: the nearest that works is 64"),
    ({"width": -8}, "width -8 is no multiple of 16"), ({"guidance": -1.0}, "guidance must be"),
    ({"guidance": math.nan}, "guidance must be"), ({"height": 512, "width": 512}, "position table ends at 16 × 16"),
    ({"noise": torch.zeros(2, 16, 8, 8)}, r"noise must have the shape \(2, 16, 16, 16\), got \(2, 16, 8, 8\)"),
    ({"guidance": 1.0, "negative_prompt": "a star"}, "negative_prompt needs classifier-free guidance"),
    ({"prompt": "a red circle and " * 9}, r"the prompt has \d+ tokens and this checkpoint reads 24"),
    ({"image": Image.new("RGB", (64, 64))}, "image: this checkpoint edits no pictures"),
])  # fmt: skip
def test_wrong_calls_name_the_argument(pipeline, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": "a circle", "images": 2, "steps": 2, **call})


def test_missing_and_broken_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-sd4 does not exist.*tiny-sd3"):
        Pipeline.load("tiny-sd4")
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER, copy)
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        Pipeline.load(copy)
    shutil.copytree(FOLDER, copy, dirs_exist_ok=True)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FileNotFoundError, match=r"lacks transformer .*model\.safetensors is an interrupted download"):
        Pipeline.load(copy)
