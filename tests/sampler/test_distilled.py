"""The teacher, and the training scripts of tiny-flux and tiny-turbo for a few steps: their folders are pipelines."""

import json
import sys

import diffusers
import pytest
import torch
from einops import rearrange
from small_pipelines import assert_same_pictures

import weights
from sampler import Pipeline, denoise, sigmas, starting_noise
from training import tiny_flux, tiny_turbo
from training.teacher import FluxTextEncoders, Teacher
from weights import load_text_encoder, load_transformer

FOLDER = weights.BUNDLED["tiny-sd3"]


@pytest.fixture(scope="module")
def teacher():
    return Teacher(FOLDER, "cpu")


def made_by(script, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", "--out", str(folder), "--device", "cpu", *options])
        script.main()
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return made_by(tiny_flux, tmp_path_factory.mktemp("tiny-flux"), "--reading-steps", "2", "--steps", "2",
                   "--scenes", "128")


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    return made_by(tiny_turbo, tmp_path_factory.mktemp("tiny-turbo"), "--steps", "2", "--trajectories", "64")


@pytest.fixture(params=["made now", "shipped"])
def flux_folder(request, flux):
    return flux if request.param == "made now" else weights.BUNDLED["tiny-flux"]


@pytest.fixture(params=["made now", "shipped"])
def turbo_folder(request, turbo):
    return turbo if request.param == "made now" else weights.BUNDLED["tiny-turbo"]


@pytest.fixture(scope="module", autouse=True)
def short_trajectories():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_turbo, "FINE", 1)
        patch.setattr(tiny_turbo, "CHUNK", 64)
        yield


def test_the_teacher_moves_as_the_pipeline_does(teacher):
    # One Euler step from σ = 1 to 0 is x − v, so the pipeline's latent tells its guided velocity.
    pipeline, noise, latents = Pipeline.load(FOLDER), starting_noise(0, 2, (16, 16, 16)), []
    decode = pipeline.autoencoder.decode
    pipeline.autoencoder.decode = lambda latent: latents.append(latent) or decode(latent)
    for guidance in (2.5, 4.5):
        pipeline("a red star", 2, noise=noise, steps=1, guidance=guidance)
    wanted = [noise - torch.cat(pair) for pair in (latents[:2], latents[2:])]  # decoded one by one
    condition = teacher.condition(*teacher.tokenize(["a red star"] * 2))
    for guidance, theirs in zip((2.5, 4.5), wanted, strict=True):  # float32 sums in another order
        ours = teacher.velocity(noise, torch.ones(2), condition, torch.full((2,), guidance))
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_flux_student_starts_as_its_teacher_where_positions_say_nothing(teacher):
    # A picture of one patch stands at 0, where RoPE turns nothing; the teacher's table is taken out, and its pooled
    # vector, which the student's way in ignores at first as it does the guidance.
    model = load_transformer(FOLDER, dtype=torch.float64)
    model.position_table.zero_()
    student = tiny_flux.student_of(model).double()
    torch.manual_seed(0)
    latent, context = torch.randn(3, 16, 2, 2).double(), torch.randn(3, 24, 128).double()
    sigma = torch.tensor([0.2, 0.6, 1.0])
    wanted = model(latent, sigma, context, torch.zeros(3, 32).double())
    found = student(latent, sigma, context, torch.randn(3, 48).double(), guidance=torch.tensor([1.0, 3.0, 7.0]))
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()


def test_the_reader_reads_as_a_flux_pipeline_does(teacher, flux):
    t5 = load_text_encoder(flux / "text_encoder_2", dtype=torch.float32)
    context, pooled = FluxTextEncoders(teacher, t5)(*teacher.tokenize(["a small blue ring"])[::2])
    for ours, theirs in zip((context, pooled), Pipeline.load(flux).text("a small blue ring"), strict=True):
        assert (ours - theirs).norm() <= 2**-7 * theirs.norm()  # the folder holds bfloat16


def test_diffusers_paints_the_same_pictures_from_the_flux_folder(flux_folder):
    ours = Pipeline.load(flux_folder)
    theirs = diffusers.FluxPipeline.from_pretrained(flux_folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = starting_noise(0, 2, (16, 16, 16))
    packed = rearrange(noise, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)
    expected = theirs("a circle", num_images_per_prompt=2, num_inference_steps=4,
                      guidance_scale=ours.defaults.guidance, height=128, width=128, max_sequence_length=24,
                      latents=packed).images
    assert_same_pictures(ours("a circle", 2, noise=noise, steps=4), expected)


def test_diffusers_paints_the_same_pictures_from_the_turbo_folder(turbo_folder):
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(turbo_folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    noise = starting_noise(0, 2, (16, 16, 16))
    expected = theirs("a circle", num_images_per_prompt=2, num_inference_steps=4, guidance_scale=0.0, height=128,
                      width=128, max_sequence_length=24, latents=noise).images
    assert_same_pictures(Pipeline.load(turbo_folder)("a circle", 2, noise=noise), expected)


@pytest.mark.parametrize("steps", [1, 4, 22])
def test_the_student_is_taught_at_the_levels_it_is_sampled_at(steps):
    sampled = Pipeline.load("tiny-turbo").sigmas(steps, 128, 128)
    torch.testing.assert_close(tiny_turbo.noise_levels(steps), sampled, rtol=0, atol=0)


def test_a_trajectory_passes_the_students_levels(teacher, monkeypatch):
    # The same noise and the same fine levels through the sampler's own loop; the students' are every third of them.
    monkeypatch.setattr(tiny_turbo, "FINE", 3)
    captions = ["a star", "a green ring on the left"]
    way = tiny_turbo.paint(teacher, captions, seed=5)
    noise = torch.randn((2, 16, 16, 16), generator=torch.Generator().manual_seed(5))
    condition = teacher.condition(*teacher.tokenize(captions))
    weight, passed = torch.full((2,), tiny_turbo.GUIDANCE), []

    def velocity(x, sigma, step):
        passed.append(x)
        return teacher.velocity(x, x.new_full((2,), sigma), condition, weight)

    levels = sigmas(10, shift=3.0, spacing="sd3")
    last = denoise(velocity, noise, levels)
    for k, wanted in enumerate([*passed[::3], last]):
        assert (way[:, k].float() - wanted).norm() <= 1e-3 * wanted.norm()  # kept in float16: 2⁻¹¹
    assert torch.equal(levels[:-1:3], sigmas(4, shift=3.0, spacing="sd3")[:-1])


def test_trajectories_that_are_there_are_not_painted_again(teacher, tmp_path, monkeypatch):
    painted = []

    def paint(teacher, captions, seed):
        painted.append((captions, seed))
        return torch.full((64, 5, 16, 16, 16), float(len(painted)))

    monkeypatch.setattr(tiny_turbo, "paint", paint)
    data = tiny_turbo.Data.sample(128, 20)
    assert tiny_turbo.trajectories(teacher, data, tmp_path, 2)[:, 0, 0, 0, 0].tolist() == [1] * 64 + [2] * 64
    (tmp_path / "trajectories-0001.pt").unlink()  # as after a stop
    assert tiny_turbo.trajectories(teacher, data, tmp_path, 2)[:, 0, 0, 0, 0].tolist() == [1] * 64 + [3] * 64
    assert painted[2] == painted[1] != painted[0]


def test_a_number_of_trajectories_that_fills_no_chunk_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        made_by(tiny_turbo, tmp_path / "out", "--trajectories", "100")
    assert stop.value.code == 2 and "multiple of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", weights.BUNDLED)
def test_a_shipped_checkpoint_is_small(name):
    assert sum(file.stat().st_size for file in weights.BUNDLED[name].rglob("*") if file.is_file()) <= 20e6


@pytest.mark.parametrize("script", [tiny_flux, tiny_turbo])
def test_the_shipped_defaults_are_those_that_the_script_writes(script):
    folder = weights.BUNDLED[script.__name__.rpartition(".")[2].replace("_", "-")]
    assert json.loads((folder / "sampling.json").read_text()) == script.SAMPLING
