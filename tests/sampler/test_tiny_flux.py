"""The training script of tiny-flux, for a few steps: its folder is a FLUX.1 pipeline, in diffusers as in ours."""

import sys

import diffusers
import pytest
import torch
from einops import rearrange
from small_pipelines import assert_same_pictures

from sampler import Pipeline, starting_noise
from weights.tiny import train_flux as script


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-flux")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_flux", "--out", str(folder), "--steps", "3", "--distill-steps", "1",
                                    "--scenes", "128", "--device", "cpu"])
        script.main()
    return folder


def test_diffusers_paints_the_same_pictures_from_its_folder(run):
    ours = Pipeline.load(run / "checkpoint")
    theirs = diffusers.FluxPipeline.from_pretrained(run / "checkpoint", torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = starting_noise(0, 2, (6, 16, 16))
    packed = rearrange(noise, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)
    expected = theirs("a circle", num_images_per_prompt=2, num_inference_steps=4, guidance_scale=4.5, height=64,
                      width=64, max_sequence_length=24, latents=packed).images
    assert_same_pictures(ours("a circle", 2, noise=noise, steps=4), expected)


def test_the_student_starts_as_the_teacher_and_learns_what_guidance_makes(run):
    teacher, student = (torch.load(run / f"{name}.pt", weights_only=True)["model"] for name in ("teacher", "student"))
    new = {name for name in student if "guidance_in" in name}
    assert new and student.keys() - new == teacher.keys()
    moved = [name for name in teacher if not torch.equal(teacher[name], student[name])]
    assert moved  # trained on, from there
    assert all((student[name] - teacher[name]).abs().max() < 0.1 for name in moved)  # one step of 1e-3, of Muon 1e-2
