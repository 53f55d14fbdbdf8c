"""Schedules against the original formulas and diffusers' scheduler; the sampling loop against closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from sampler import denoise, sigmas, starting_noise
from sampler.schedule import Schedule, flux2_mu

DATA = Path(__file__).parents[1] / "data"
RELATIVE = 1e-6  # the bound; float32 holds 6e-8


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), expected, rtol=RELATIVE, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_schnell_is_a_straight_line(steps):
    close(sigmas(steps), [1 - i / steps for i in range(steps)] + [0])


@pytest.mark.parametrize("steps,tokens", [(20, 4096), (28, 1024), (50, 256), (7, 2304)])
def test_dev_follows_its_exponential_shift(steps, tokens):
    mu = 0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5)
    expected = [math.exp(mu) / (math.exp(mu) + 1 / (1 - i / steps) - 1) for i in range(steps)] + [0]
    close(sigmas(steps, image_tokens=tokens), expected)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    close(sigmas(steps, image_tokens=tokens), scheduler.sigmas.numpy())


def test_flux2_follows_its_empirical_shift():
    """The golden numbers are of the official program: the levels are float32 there, μ is not rounded."""
    rows = json.loads((DATA / "flux2.schedule.json").read_bytes())
    assert {row["image_tokens"] > 4300 for row in rows} == {True, False} and len({row["steps"] for row in rows}) > 2
    for row in rows:
        tokens, steps = row["image_tokens"], row["steps"]
        assert flux2_mu(tokens, steps) == pytest.approx(row["mu"], rel=1e-12)
        close(sigmas(steps, image_tokens=tokens, spacing="flux2"), row["sigmas"])
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
        close(sigmas(steps, image_tokens=tokens, spacing="flux2"), scheduler.sigmas.numpy())


@pytest.mark.parametrize("dynamic", [{}, {"use_dynamic_shifting": False}, {"use_dynamic_shifting": True}])
def test_flux2s_scheduler_config_does_not_change_its_levels(dynamic):
    of_flux1 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    schedule = Schedule.from_hub(of_flux1 | dynamic, "flux2")
    assert torch.equal(schedule.sigmas(4, 4096), sigmas(4, image_tokens=4096, spacing="flux2"))
    with pytest.raises(ValueError, match="use_karras_sigmas True is not supported"):
        Schedule.from_hub(of_flux1 | {"use_karras_sigmas": True}, "flux2")


def test_a_shift_that_is_given_goes_before_flux2s_own():
    assert torch.equal(Schedule("flux2", 2.0).sigmas(4, 4096), sigmas(4, shift=2.0))


@pytest.mark.parametrize("steps", [2, 4, 28, 40])
@pytest.mark.parametrize("shift", [3.0, 2.0, 1.0])
def test_sd3_shifts_twice_and_ends_above_one_thousandth(steps, shift):
    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    end = shifted(1 / 1000)
    expected = [shifted(1 + (end - 1) * i / (steps - 1)) for i in range(steps)] + [0]
    close(sigmas(steps, shift=shift, spacing="sd3"), expected)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    close(sigmas(steps, shift=shift, spacing="sd3"), scheduler.sigmas.numpy())


def test_sd3_in_one_step_goes_all_the_way():
    close(sigmas(1, shift=3.0, spacing="sd3"), [1, 0])


@pytest.mark.parametrize("spacing", ["flux", "sd3"])
@pytest.mark.parametrize("config", [
    {}, {"shift": 2.5}, {"use_dynamic_shifting": True, "shift": 3.0},
    {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 2.0, "base_image_seq_len": 64,
     "max_image_seq_len": 8192},
    {"shift_terminal": None, "invert_sigmas": False},
])
def test_scheduler_config_gives_diffusers_levels(spacing, config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    for steps, tokens in [(4, 1024), (28, 4096), (9, 100)]:
        about = scheduler.config
        slope = (about.max_shift - about.base_shift) / (about.max_image_seq_len - about.base_image_seq_len)
        mu = about.base_shift + slope * (tokens - about.base_image_seq_len)
        levels = {"sigmas": np.linspace(1, 1 / steps, steps)} if spacing == "flux" else {"num_inference_steps": steps}
        scheduler.set_timesteps(**levels, mu=mu if about.use_dynamic_shifting else None)
        ours = Schedule.from_hub({"_class_name": "FlowMatchEulerDiscreteScheduler", **dict(about), **config}, spacing)
        close(ours.sigmas(steps, tokens), scheduler.sigmas.numpy())


@pytest.mark.parametrize(("config", "message"), [
    ({"_class_name": "DDIMScheduler"}, "describes a DDIMScheduler, not a FlowMatchEulerDiscreteScheduler: say"),
    ({"use_karras_sigmas": True}, "use_karras_sigmas True is not supported: set it to False"),
    ({"use_beta_sigmas": True}, "use_beta_sigmas True"), ({"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    ({"invert_sigmas": True}, "invert_sigmas True"), ({"stochastic_sampling": True}, "stochastic_sampling"),
    ({"num_train_timesteps": 500}, "num_train_timesteps 500 is not supported: set it to 1000"),
    ({"shift": None}, "shift None is no number"),
    ({"shift": "3.0"}, "shift must be a finite number above 0, got '3.0'"),
    ({"shift": [3.0]}, r"got \[3.0\]"), ({"shift": True}, "got True"), ({"base_shift": None}, "base_shift must"),
    ({"max_image_seq_len": "4096"}, "max_image_seq_len must"),
    ({"time_shift_type": "linear"}, "time_shift_type 'linear' is not"),
    ({"shift_terminal": 0.02}, "shift_terminal 0.02 is not supported"),
    ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting 'yes' not true or false"),
    ({"base_image_seq_len": 4096}, "must differ"),
])
def test_a_scheduler_config_that_is_not_honored_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_hub(config, "flux")


def test_a_shift_that_is_given_holds_for_pictures_of_any_size():
    assert torch.equal(sigmas(4, shift=3.0, image_tokens=4096), sigmas(4, shift=3.0))
    assert not torch.equal(sigmas(4, image_tokens=4096), sigmas(4))


@pytest.mark.parametrize("call,message", [
    ({"steps": 0}, "steps must be at least 1, got 0"), ({"steps": 4, "shift": 0.0}, "shift must be"),
    ({"steps": 4, "shift": math.inf}, "shift must be"), ({"steps": 4, "spacing": "karras"}, '"flux2" or "sd3"'),
])  # fmt: skip
def test_bad_schedules_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        sigmas(**call)


def test_denoise_along_a_straight_path_is_exact_in_any_number_of_steps():
    torch.manual_seed(0)
    noise, image = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for levels in (sigmas(1), sigmas(7), sigmas(9, shift=3.0, spacing="sd3")):
        found = denoise(lambda x, sigma, step: noise - image, noise, levels)
        torch.testing.assert_close(found, image, rtol=1e-12, atol=1e-12)  # float64: the steps' lengths add up to 1


def test_denoise_converges_to_the_exact_flow_of_a_gaussian():
    # Pictures N(0, s²), noise N(0, 1): the velocity is linear in x, and the flow multiplies x by s as σ goes 1 → 0.
    s = 0.5

    def velocity(x, sigma, step):
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        return x * (sigma - (1 - sigma) * s**2) / variance

    noise = torch.tensor([[1.0, -2.0, 0.3]], dtype=torch.float64)
    errors = [(denoise(velocity, noise, sigmas(n)) - s * noise).norm().item() for n in (50, 100, 200)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    assert errors[2] < 0.01


def test_denoise_tells_the_velocity_where_it_is():
    seen = []
    denoise(lambda x, sigma, step: seen.append((sigma, step)) or x * 0, torch.zeros(1), torch.tensor([1.0, 0.5, 0.0]))
    assert seen == [(1.0, 0), (0.5, 1)]


def test_noise_of_a_picture_depends_on_seed_and_index_alone():
    eight = starting_noise(3, 8, (2, 4, 4))
    assert torch.equal(starting_noise(3, 1, (2, 4, 4)), eight[:1])
    assert torch.equal(starting_noise(3, 4, (2, 4, 4)), eight[:4])
    others = torch.cat([starting_noise(seed, 8, (2, 4, 4)) for seed in range(5)]).flatten(1)
    assert torch.unique(others, dim=0).shape[0] == 40  # no picture shares its noise with another seed's
    beyond = [2**32, 2**32 + 3, 2**40, 2**64 + 3]  # torch's own generator reads 32 bits of a seed
    many_seeds = torch.cat([starting_noise(seed, 3, (2, 4, 4)) for seed in (0, 3, *beyond)]).flatten(1)
    assert torch.unique(many_seeds, dim=0).shape[0] == 18
    assert torch.equal(starting_noise(2**32, 3, (2, 4, 4))[:1], starting_noise(2**32, 1, (2, 4, 4)))
    with torch.device("meta"):  # the default device is not its business
        assert torch.equal(starting_noise(3, 8, (2, 4, 4)), eight)
    many = torch.cat([starting_noise(0, 1000, (16,)), starting_noise(2**33, 1000, (16,))])
    assert abs(many.mean().item()) < 4 / math.sqrt(32000) and abs(many.var().item() - 1) < 4 * math.sqrt(2 / 32000)
