"""The other methods: each formula against autograd, closed forms and invariants, then inside the pipeline."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_pipeline import pixels
from torch import nn

from repulsion import Repulsion
from sampler import __main__ as cli
from sampler import options, program, starting_noise
from sampler.guidance import GuidedVelocity
from sampler.methods import (
    CADS,
    CNO,
    DAVE,
    METHODS,
    SPARKE,
    STRIDE,
    CoupledNoise,
    DiverseFlow,
    FeatureSelfGuidance,
    GroupSelection,
    IntervalGuidance,
    ParticleGuidance,
    PinkNoise,
    SeedVariance,
)
from sampler.methods.diverseflow import JITTER, log_likelihood_gradient
from sampler.methods.method import CAP, Method, score_to_velocity
from sampler.methods.particle import log_potential_gradient
from sampler.methods.sparke import frobenius_gradient
from sampler.parts import Part

STEERING = [ParticleGuidance(), SPARKE(), DiverseFlow()]


def latents(b=5, seed=0, shape=(3, 4, 4)):
    """Noisy latents and velocities of different lengths."""
    x, v = starting_noise(seed, 2 * b, shape).chunk(2)
    return x * torch.linspace(0.5, 2, b).view(-1, 1, 1, 1), v


def same(found, expected):
    return all((a == b).all() for a, b in zip(pixels(found), pixels(expected), strict=True))


# ---- the score rule


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_a_score_term_becomes_a_velocity_term_as_two_gaussians_say(sigma):
    # x₀ ~ N(m, s²), n ~ N(0, 1): everything about x = (1 − σ) x₀ + σ n is known
    def score_and_velocity(x, m, s):
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        z = (x - (1 - sigma) * m) / variance
        return -z, sigma * z - (m + (1 - sigma) * s**2 * z)  # ∇ log p(x), E[n | x] − E[x₀ | x]

    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    (score, velocity), (other_score, other_velocity) = score_and_velocity(x, 0.7, 0.4), score_and_velocity(x, -1.0, 1.3)
    found = velocity - score_to_velocity(sigma) * (other_score - score)
    torch.testing.assert_close(found, other_velocity, rtol=1e-12, atol=1e-12)


def test_near_pure_noise_the_factor_is_capped():
    assert score_to_velocity(1.0) == score_to_velocity(0.99) == CAP and score_to_velocity(0.0) == 0
    assert score_to_velocity(10 / 11) == pytest.approx(CAP) and score_to_velocity(0.9) == pytest.approx(9)


# ---- gradients


def pairs(x):
    """|x_i − x_j|², all and the median of the pairs; the latter a constant."""
    squared = (x[:, None] - x[None]).square().sum(-1)
    return squared, squared.detach()[torch.ones_like(squared).triu(1).bool()].quantile(0.5)


def log_potential(x):
    squared, median = pairs(x)
    return -(-squared * math.log(len(x)) / median).exp().triu(1).sum()


def frobenius(x):
    u = x / x.norm(dim=1, keepdim=True)
    return (-pairs(u)[0] / (2 * 0.6**2)).exp().square().mean()


def log_likelihood(x):
    squared, median = pairs(x)
    kernel = (-squared / median).exp() + JITTER * torch.eye(len(x))
    return kernel.logdet() - (kernel + torch.eye(len(x))).logdet()


@pytest.mark.parametrize("value,gradient", [
    (log_potential, log_potential_gradient), (frobenius, lambda x: frobenius_gradient(x, 0.6)),
    (log_likelihood, log_likelihood_gradient),
])  # fmt: skip
@pytest.mark.parametrize("b", [2, 5])
def test_gradients_are_those_of_autograd(value, gradient, b):
    x = latents(b)[0].flatten(1).double().requires_grad_()
    (expected,) = torch.autograd.grad(value(x), x)
    found = gradient(x.detach())
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12  # float64, and inverses of condition ~10
    outward = torch.cosine_similarity(found, x.detach() - x.detach().mean(0)).mean()
    assert outward < 0 if value is frobenius else outward > 0  # the one to descend, the others to climb


@pytest.mark.parametrize("method", STEERING, ids=lambda m: type(m).__name__)
def test_a_permuted_batch_is_pushed_the_same_way(method):
    x, v = latents()
    order = torch.tensor([3, 0, 4, 1, 2])
    found = method.steer(x[order], v[order], 0.8, 0.7, 0)
    torch.testing.assert_close(found, method.steer(x, v, 0.8, 0.7, 0)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [ParticleGuidance(0.01), SPARKE(0.01, bandwidth=0.3), DiverseFlow(0.01)],
                         ids=lambda m: type(m).__name__)  # fmt: skip
def test_near_latents_part_and_far_ones_hardly_move(method):
    x, _ = latents(2)
    x = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def growth(apart):
        """How much further apart, as a share, a step takes two unit vectors that are this far apart."""
        first = x[0]
        across = x[1] - (x[1] * first).sum() * first
        cosine = 1 - apart**2 / 2
        two = torch.stack([first, cosine * first + math.sqrt(1 - cosine**2) * across / across.norm()])
        after = two - 0.1 * method.steer(two, torch.zeros_like(two), 0.8, 0.7, 0)
        return ((after[0] - after[1]).norm() / (two[0] - two[1]).norm() - 1).item()

    assert growth(0.1) > 0.005
    if isinstance(method, SPARKE):  # its pushes are of one length: compare within a group
        near = torch.stack([x[0], x[0] + 0.05 * x[1], -x[0] + x[1], -x[0] - x[1]])
        moved = (method.steer(near, torch.zeros_like(near), 0.8, 0.7, 0)).flatten(1).norm(dim=1)
        assert moved[2:].max() < 0.01 * moved[:2].min()
    else:  # the bandwidth follows the distance, so that the push falls as one over it
        assert growth(1.0) == pytest.approx(growth(0.1) / 100, rel=0.05)


@pytest.mark.parametrize("method", STEERING, ids=lambda m: type(m).__name__)
def test_alone_or_all_alike_nobody_is_pushed(method):
    x, v = latents(1)
    assert torch.equal(method.steer(x, v, 0.8, 0.7, 0), v)
    x, v = x.repeat(4, 1, 1, 1), v.repeat(4, 1, 1, 1)
    assert torch.equal(method.steer(x, v, 0.8, 0.7, 0), v)


def test_sparke_moves_the_group_by_its_share_after_the_step_and_only_in_its_steps():
    x, v = latents()
    plain = x - 0.1 * v
    moved = x - 0.1 * SPARKE(0.2, every=3).steer(x, v, 0.8, 0.7, 3)
    assert ((moved - plain).norm() / plain.norm()).item() == pytest.approx(0.2, rel=1e-5)
    value = [frobenius(y.flatten(1).double()).item() for y in (plain, moved)]
    assert value[1] < value[0]
    assert torch.equal(SPARKE(0.2, every=3).steer(x, v, 0.8, 0.7, 4), v)


def test_particle_guidance_stops_where_there_is_more_picture_than_noise():
    x, v = latents()
    assert torch.equal(ParticleGuidance().steer(x, v, 0.49, 0.4, 0), v)
    assert not torch.equal(ParticleGuidance().steer(x, v, 0.51, 0.4, 0), v)


# ---- CADS


def prompt_of(samples, branches=2):
    context, pooled = starting_noise(5, branches, (6, 8)), starting_noise(6, branches, (12,)) + 3
    return [y.repeat_interleave(samples, dim=0) for y in (context, pooled)]


@pytest.mark.parametrize("sigma,gamma", [(1.0, 0.0), (0.9, 0.0), (0.55, 0.5), (0.3, 1.0), (0.1, 1.0)])
def test_cads_follows_its_schedule_and_keeps_mean_and_deviation(sigma, gamma):
    context, pooled = prompt_of(500)
    found, bare = (cads.annealed(lambda *_: (context, pooled), seed=1)(500, sigma, 3)
                   for cads in (CADS(0.4), CADS(0.4, mix=0.0)))
    for y, rescaled, noised in zip((context, pooled), found, bare, strict=True):
        assert torch.equal(rescaled[:500], y[:500])  # the unconditional branch
        if gamma == 1:
            assert rescaled is y
            continue
        y, rescaled, noised = (t[500:].flatten(1).double() for t in (y, rescaled, noised))
        torch.testing.assert_close(rescaled.mean(1), y.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rescaled.std(1), y.std(1), rtol=1e-5, atol=1e-5)
        noise = (noised - gamma**0.5 * y) / (0.4 * (1 - gamma) ** 0.5)
        # 6,000 and more standard normal numbers: their mean is 0 within 5 / √6000, their deviation 1 within 5 / √12000
        assert abs(noise.mean()) < 0.065 and abs(noise.std() - 1) < 0.046


def test_cads_noise_depends_on_seed_step_and_index_alone():
    def context_of(samples, step=2, seed=4):
        return CADS().annealed(lambda n, *_: prompt_of(n, 1), seed)(samples, 0.6, step)[0]

    eight, three = context_of(8), context_of(3)
    assert torch.equal(eight[:3], three)
    other_step, other_seed = context_of(3, step=3), context_of(3, seed=5)
    vectors = torch.cat([eight, other_step, other_seed]).flatten(1) - prompt_of(14, 1)[0].flatten(1)
    assert torch.pdist(vectors).min() > 0.1


# ---- interval guidance


def test_interval_guidance_is_the_weight_inside_and_one_outside():
    def guided_at(method, *levels):
        velocity = method.velocity(lambda x, sigma, step, guided=True: guided, torch.tensor([]))
        return [velocity(None, sigma, 0) for sigma in levels]

    inside = guided_at(IntervalGuidance(0.2, low=0.3), 1.0, 0.81, 0.8, 0.5, 0.31, 0.3, 0.1)
    assert inside == [False, False, True, True, True, False, False]
    assert guided_at(IntervalGuidance(0.0), 1.0) == [True]


def test_outside_the_interval_the_prompt_alone_is_read(pipeline):
    found = pipeline("a ring", 2, steps=4, method=IntervalGuidance(1.0))
    assert same(found, pipeline("a ring", 2, steps=4, guidance=1.0))


# ---- in the pipeline


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_strength_0_is_plain_sampling_and_more_is_not(pipeline, name, guidance):
    call = {"prompt": "a ring", "images": 3, "steps": 4, "guidance": guidance}
    if (name, guidance) in (("interval", 1.0), ("teacher", 4.5)):
        refusal = "needs guidance to limit" if guidance == 1 else "is for few-step models, which have no guidance"
        with pytest.raises(ValueError, match=refusal):
            pipeline(**call, method=METHODS[name]())
        return
    plain = pipeline(**call)
    assert same(pipeline(**call, method=METHODS[name](strength=0.0)), plain)
    assert not same(pipeline(**call, method=METHODS[name]()), plain)


def test_a_method_acts_beside_repulsion(pipeline):
    call, push = {"prompt": "a ring", "images": 3, "steps": 4}, Repulsion(strength=1.0, steps=2)
    repelled, both = (pipeline(**call, repulsion=push, method=method) for method in (None, SPARKE()))
    assert not same(both, repelled) and not same(both, pipeline(**call, method=SPARKE()))


def test_every_method_keeps_picture_i_whatever_the_batch_where_pictures_do_not_meet(pipeline):
    for method in (CADS(), IntervalGuidance(), DAVE(), STRIDE(), PinkNoise(), SeedVariance()):
        four, two = (pixels(pipeline("a star", n, seed=3, steps=4, method=method)) for n in (4, 2))
        assert abs(four[:2] - two).max() <= 1  # float32 sums in another order


@pytest.mark.parametrize("settings,message", [
    *(((method, {"strength": strength}), f"{method.__name__}'s strength must be a finite number, 0 or more")
      for method in (Method, *METHODS.values()) for strength in (-1.0, math.nan, math.inf)),
    ((CADS, {"start": 0.8}), "CADS's start and stop must be"), ((CADS, {"mix": 2}), "CADS's mix must be"),
    ((ParticleGuidance, {"low": -0.1}), "ParticleGuidance's low must be a number from 0 to 1, got -0.1"),
    ((CoupledNoise, {"strength": 1.1}), "CoupledNoise's strength must be a number from 0 to 1"),
    ((DAVE, {"block": -1}), "DAVE's block must be a number 0 or more"), ((DAVE, {"share": 2}), "DAVE's share must be"),
    ((FeatureSelfGuidance, {"mix": math.nan}), "FeatureSelfGuidance's mix must be a number from 0 to 1, got nan"),
    ((FeatureSelfGuidance, {"temperature": 0}), "FeatureSelfGuidance's temperature must be a number 0.001 or more"),
    ((STRIDE, {"components": 0}), "STRIDE's components must be a number 1 or more"),
    ((SeedVariance, {"share": -1}), "SeedVariance's share must be"), ((CNO, {"window": 0}), "CNO's window must be"),
    ((SPARKE, {"bandwidth": 0}), "SPARKE's bandwidth must be"), ((SPARKE, {"every": 0}), "SPARKE's every must be"),
    ((IntervalGuidance, {"strength": 1.1}), "IntervalGuidance's strength must be a number from 0 to 1"),
    ((IntervalGuidance, {"low": 2}), "IntervalGuidance's low must be"),
    ((GroupSelection, {"pruning": 1.5}), "GroupSelection's pruning must be"),
])  # fmt: skip
def test_bad_settings_are_named(settings, message):
    method, fields = settings
    with pytest.raises(ValueError, match=message):
        method(**fields)


# ---- on the command line


def parsed(*arguments):
    return options.parser().parse_args(["a star", *arguments])


def test_an_unknown_method_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--method", "cad")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(name in error for name in METHODS)
    assert program.method(parsed("--strength", "1")) is None  # of repulsion, the default
    assert program.settings(parsed("--strength", "1"), Repulsion(2.0)) == Repulsion(1.0)
    with pytest.raises(ValueError, match="CADS's strength"):
        program.method(parsed("--method", "cads", "--strength", "nan"))


def test_a_method_takes_the_place_of_repulsion_unless_that_is_asked_for():
    assert program.method(parsed("--method", "sparke", "--strength", "0.4")) == SPARKE(0.4)
    assert program.method(parsed("--method", "sgi")) == GroupSelection() and program.method(parsed()) is None
    default = Repulsion(strength=0.1)
    assert program.settings(parsed("--method", "cads"), default) is None
    assert program.settings(parsed("--method", "cads", "--repel-steps", "3"), default) == replace(default, steps=3)
    assert program.settings(parsed(), default) == default


@pytest.mark.parametrize("also", [(), ("--iterations", "2")])
def test_the_program_writes_the_methods_batch_beside_the_typical_one(pipeline, monkeypatch, tmp_path, capsys, also):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.Pipeline, "load", classmethod(lambda cls, *where, **options: pipeline))
    monkeypatch.setattr(sys, "argv", ["sampler", "a star", "--images", "1", "--steps", "2", "--method", "cads", *also])
    assert cli.main() == 0
    folder = tmp_path / "outputs" / "a-star"
    names = {f"{batch}{part}.png" for batch in ("base", "cads") for part in ("", "-00")}
    assert {file.name for file in folder.iterdir()} == names | {"compare.png", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == {"name": "cads", "strength": 0.25, "start": 0.3, "stop": 0.8, "mix": 1.0}
    assert (summary["repulsion"] is None) == (not also) and set(summary["batches"]) == {"base", "cads"}
    assert json.loads(Image.open(folder / "cads-00.png").text["method"])["name"] == "cads"
    assert json.loads(Image.open(folder / "base-00.png").text["method"]) is None
    assert "cads" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("method", [ParticleGuidance(0.3), DiverseFlow(0.3)], ids=lambda method: type(method).__name__)
def test_a_push_is_its_gradient_times_its_schedule(method):
    x, v = latents()
    at, gradient, factor = {
        ParticleGuidance: (x, log_potential_gradient, score_to_velocity(0.8)),  # of the noisy latents
        DiverseFlow: (x - 0.8 * v, log_likelihood_gradient, 0.8),  # of the predicted pictures, times dx̂₀/dv
    }[type(method)]
    flat = at.flatten(1).double()
    wanted = v.double() - (0.3 * flat.shape[1] * factor * gradient(flat)).view_as(x)
    assert (method.steer(x, v, 0.8, 0.7, 0) - wanted).norm() < 1e-6 * wanted.norm()


class Told(nn.Module):
    """A transformer that notes the guidance it is given, and returns bfloat16."""

    def __init__(self):
        super().__init__()
        self.guidance = []

    def forward(self, latent, guidance, **_):
        self.guidance.append(guidance.tolist())
        return latent.bfloat16()


def test_without_guidance_a_distilled_model_is_told_1_and_velocities_are_float32():
    model, x = Told(), starting_noise(0, 2, (4, 2, 2))
    velocity = GuidedVelocity(Part(lambda: model), lambda *_: (torch.zeros(2, 1, 1), None), 4, distilled=3.5)
    assert velocity(x, 1.0, 0).dtype == velocity(x, 1.0, 0, guided=False).dtype == torch.float32
    assert model.guidance == [[3.5] * 2, [1.0] * 2]
