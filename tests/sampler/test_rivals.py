"""The rivals of 2026: the hooks inside the transformer, each formula against a closed form, then full-size models."""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from small_flux2 import klein
from small_pipelines import photo, saved
from test_methods import same
from test_pipeline import pixels

from mmdit import MMDiT, MMDiTConfig
from repulsion.solvers import gradient_matrix
from sampler import Pipeline, starting_noise
from sampler.guidance import GuidedVelocity
from sampler.methods import (
    CADS,
    CNO,
    DAVE,
    METHODS,
    STRIDE,
    CoupledNoise,
    FeatureSelfGuidance,
    Method,
    PinkNoise,
    SeedVariance,
    TeacherFirst,
    cno,
)
from sampler.methods.cno import contrastive
from sampler.methods.fsg import dispersion_derivative
from sampler.methods.inside import Inside, Place, in_first
from sampler.methods.pink import pink
from sampler.methods.stride import principal_components
from sampler.parts import Part, stream_blocks

# ---- hooks


@dataclass(frozen=True)
class Shift(Inside):
    """Adds the strength to the image tokens that leave one block; notes what `again` makes of them."""

    strength: float = 2.0
    block: int = 1
    seen: list = ()

    def blocks(self, count):
        return (self.block,)

    def acts_at(self, sigma, step, steps):
        return step == 0

    def change(self, image, again, place):
        self.seen.append((again(image), place))
        return image + self.strength


def small_model(**kind):
    """Two blocks of each kind, FLUX's or, with a table, SD3's four dual-stream ones."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "latent_channels": 4, "context_dim": 16, "pooled_dim": 12}
    model = MMDiT(MMDiTConfig(**sizes, **kind)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


FLUX = {"num_dual_blocks": 2, "num_single_blocks": 2, "rope_axes": (4, 6, 6)}
SD3 = {"num_dual_blocks": 4, "position": "table", "position_table_size": 8}
TEXT, ROWS, COLUMNS = 5, 3, 4


def guided(model, references=()):
    """The velocity of two branches of guidance, for a batch of two."""
    context, pooled = starting_noise(1, 4, (TEXT, 16)), starting_noise(2, 4, (12,))
    return GuidedVelocity(Part(lambda: model), lambda *_: (context, pooled), 4, weight=3.0, references=references)


def entering(model, block, velocity, x):
    """The arguments with which a block is called, text and image in one sequence; and the velocity."""
    blocks, seen = [*model.dual_blocks.children(), *model.single_blocks.children()], []
    with blocks[block].register_forward_pre_hook(lambda _, args: seen.append(args)):
        v = velocity(x, 1.0, 0)
    (args,) = seen
    return torch.cat(args[:2], dim=1) if block < len(model.dual_blocks) else args[0], args, v


@pytest.mark.parametrize("kind,block,references", [
    (FLUX, 0, 0), (FLUX, 1, 2), (FLUX, 2, 0), (FLUX, 2, 2), (SD3, 1, 0)])
@pytest.mark.parametrize("streamed", [False, True])
@torch.no_grad()
def test_the_pictures_own_tokens_change_in_blocks_of_both_kinds_and_all_branches(kind, block, references, streamed):
    model = small_model(**kind)
    if streamed:
        stream_blocks(model, torch.device("cpu"))
    x = starting_noise(3, 2, (4, 2 * ROWS, 2 * COLUMNS))
    velocity = guided(model, [starting_noise(4, 1, (4, 4, 6))] * references)
    plain, _, v = entering(model, block + 1, velocity, x)
    method = Shift(block=block, seen=[])
    shifted, _, moved = entering(model, block + 1, method.velocity(velocity, torch.linspace(1, 0, 5)), x)
    expected = torch.zeros_like(plain)
    expected[:, TEXT : TEXT + ROWS * COLUMNS] = 2
    torch.testing.assert_close(shifted - plain, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(v, moved)
    assert method.seen[0][1] == Place(ROWS, COLUMNS, 2, seed=0, step=0, block=block)
    assert torch.equal(velocity(x, 1.0, 0), v)  # no hook is left behind


@pytest.mark.parametrize("kind,block", [(FLUX, 1), (FLUX, 3), (SD3, 2), (SD3, 3)])
@torch.no_grad()
def test_again_is_the_block_on_its_own_output(kind, block):
    model, method = small_model(**kind), Shift(block=block, seen=[])
    x = starting_noise(3, 2, (4, 2 * ROWS, 2 * COLUMNS))
    velocity = guided(model, [starting_noise(4, 1, (4, 4, 6))] if kind is FLUX else [])
    method.velocity(velocity, torch.linspace(1, 0, 5))(x, 1.0, 0)
    _, args, _ = entering(model, block, velocity, x)
    module = [*model.dual_blocks, *model.single_blocks][block]
    own = slice(TEXT, TEXT + ROWS * COLUMNS)
    if block < len(model.dual_blocks):
        expected = module(args[0], module(*args)[1], *args[2:])[1][:, : ROWS * COLUMNS]
    else:
        expected = module(torch.cat([args[0][:, :TEXT], module(*args)[:, TEXT:]], dim=1), *args[1:])[:, own]
    torch.testing.assert_close(method.seen[0][0], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_steps_are_plain_and_a_block_that_is_not_there_is_named():
    velocity, x = guided(small_model(**FLUX)), starting_noise(3, 2, (4, 6, 8))
    sigmas = torch.linspace(1, 0, 5)
    assert torch.equal(Shift(seen=[]).velocity(velocity, sigmas)(x, 0.75, 1), velocity(x, 0.75, 1))
    with pytest.raises(ValueError, match=r"DAVE acts in block 4, but this model's blocks end at 3"):
        DAVE(block=4).velocity(velocity, sigmas)(x, 1.0, 0)


def test_a_share_of_the_steps_is_at_least_one():
    assert [sum(in_first(1 / 7, step, steps) for step in range(steps)) for steps in (1, 4, 20, 28)] == [1, 1, 3, 4]


def test_blocks_that_stay_in_the_cpus_memory_are_hooked_as_well(pipeline):
    streamed = Pipeline.load("tiny-sd3", offload="blocks")
    for method in (FeatureSelfGuidance(), STRIDE()):
        found = [pixels(one("a ring", 2, steps=2, method=method)) for one in (pipeline, streamed)]
        assert abs(found[0] - found[1]).max() <= 1


# ---- DAVE, Feature Self-Guidance, STRIDE

GRID = Place(rows=4, columns=6, samples=3, seed=5, step=0, block=1)


def image_tokens(branches=2):
    """Tokens of samples that resemble each other, as those of one prompt do."""
    shared, own = starting_noise(6, branches, (24, 16)), starting_noise(7, 3 * branches, (24, 16))
    return shared.repeat_interleave(3, dim=0) + 0.5 * own + 1


def test_dave_scales_the_mean_and_nothing_else():
    image = image_tokens()
    found = DAVE(0.3).change(image, None, GRID)
    torch.testing.assert_close(found.mean(1), 0.7 * image.mean(1))
    torch.testing.assert_close(found - found.mean(1, keepdim=True), image - image.mean(1, keepdim=True))


def similarity(h, temperature):
    """log mean_{i≠j} exp(cos / τ)."""
    u = h / h.norm(dim=1, keepdim=True)
    return torch.stack([u[i] @ u[j] / temperature for i, j in product(range(len(h)), repeat=2)
                        if i != j]).exp().mean().log()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_feature_self_guidance_is_the_loop_that_autograd_walks_in_each_branch_by_itself(temperature):
    method = FeatureSelfGuidance(0.4, mix=0.0, iterations=7, temperature=temperature)
    found = method.change(image_tokens().double(), lambda moved: moved, GRID)
    for branch, result in zip(image_tokens().double().split(3), found.split(3), strict=True):
        start = branch.flatten(1)
        h = start
        for _ in range(7):
            h = h.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(similarity(h, temperature), h)
            h = (h - 0.4 / 7 * start.norm() / gradient.norm() * gradient).detach()
        torch.testing.assert_close(result.flatten(1), h, rtol=1e-5, atol=1e-5)  # the push is applied in float32
        assert similarity(h, temperature) < similarity(start, temperature)


def test_its_gradient_of_two_samples_is_the_cosines():
    # with one pair P is 1/2 for either order, so that the gradient of the mean is that of cos / τ
    a, b = torch.tensor([[3.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    h = torch.stack([a, b])
    objective = partial(dispersion_derivative, temperature=0.5)
    d = torch.from_numpy(-gradient_matrix((h @ h.mT)[None].numpy(), objective, 0.0))[0]
    cosine = 1 / math.sqrt(2)
    expected = torch.stack([b / (3 * math.sqrt(8)) - cosine * a / 9, a / (3 * math.sqrt(8)) - cosine * b / 8]) / 0.5
    torch.testing.assert_close(d @ h, expected)


def test_it_mixes_in_what_the_block_makes_of_the_moved_tokens_and_moves_nobody_alone_or_among_twins():
    image = image_tokens()
    moved = FeatureSelfGuidance(mix=0.0).change(image, lambda moved: moved, GRID)
    mixed = FeatureSelfGuidance(mix=0.4).change(image, lambda moved: 10 * moved, GRID)
    torch.testing.assert_close(mixed, 0.6 * moved + 0.4 * 10 * moved)
    assert torch.equal(FeatureSelfGuidance().change(image, None, GRID._replace(samples=1)), image)
    twins = image[:1].repeat(6, 1, 1)
    assert torch.equal(FeatureSelfGuidance(mix=0.0).change(twins, lambda moved: moved, GRID), twins)


def test_the_principal_components_are_those_of_the_singular_value_decomposition():
    torch.manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(2, n, 12, dtype=torch.float64)).Q for n in (24, 16))
    tokens = u * 2.0 ** -torch.arange(12) @ v.mT  # each singular value is half of the one before
    basis = principal_components(tokens, 4)
    torch.testing.assert_close(basis @ basis.mT, v[..., :4] @ v[..., :4].mT, rtol=0, atol=1e-5)  # (1/2)^(2 · 10)


def test_stride_adds_smooth_noise_of_its_length_along_them():
    image = image_tokens()
    added = STRIDE(0.3, components=2).change(image, None, GRID) - image
    centered = image - image.mean(1, keepdim=True)
    torch.testing.assert_close(added.flatten(1).norm(dim=1), 0.3 * centered.flatten(1).norm(dim=1), rtol=1e-4, atol=0)
    assert (torch.linalg.matrix_rank(added, rtol=1e-4) == 2).all()
    basis = principal_components(centered, 2)
    torch.testing.assert_close(added @ basis @ basis.mT, added, rtol=1e-4, atol=1e-5)
    fields = (added @ basis)[:3].mT  # as drawn, but for their length
    expected = pink(starting_noise(-1 - 50_000 - 1, 3, (2, 4, 6)), 1.0).flatten(2)
    torch.testing.assert_close(fields / fields.norm(dim=(1, 2), keepdim=True),
                               expected / expected.norm(dim=(1, 2), keepdim=True), rtol=1e-4, atol=1e-4)
    alone = STRIDE(0.3, components=2).change(image[:1], None, GRID._replace(samples=1)) - image[:1]
    torch.testing.assert_close(alone, added[:1], rtol=1e-4, atol=1e-5)
    for other in (GRID._replace(seed=6), GRID._replace(step=1), GRID._replace(block=2)):
        assert not torch.allclose(STRIDE(0.3, components=2).change(image, None, other) - image, added, atol=0.05)


# ---- starting noise


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("images", [2, 3, 8])
def test_coupled_noise_has_variance_1_and_the_correlation_that_was_asked_for(images, strength):
    # the rule is linear: what it makes of unit vectors is its matrix, and the covariance is that times its transpose
    matrix = CoupledNoise(strength).noise(lambda count: torch.eye(count, dtype=torch.float64), images)
    expected = torch.full((images, images), -strength / (images - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(matrix @ matrix.mT, expected)
    if strength == 1:
        torch.testing.assert_close(matrix.sum(0), torch.zeros(images, dtype=torch.float64))
    assert torch.equal(CoupledNoise(strength).noise(torch.ones, 1), torch.ones(1))


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 4)])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_pink_noise_has_variance_1_and_power_that_falls_with_frequency(size, exponent):
    # the rule is a circular filter: its response to one unit is its kernel, whose squares sum to the variance
    unit = torch.zeros(1, 1, *size, dtype=torch.float64)
    unit[..., 0, 0] = 1
    kernel = PinkNoise(exponent).noise(lambda images: unit, 1)
    assert kernel.square().sum().item() == pytest.approx(1, rel=1e-6)
    power = torch.fft.fft2(kernel)[0, 0].abs().square()

    def frequency(row, column):
        waves = [min(i, n - i) / n for i, n in zip((row, column), size, strict=True)]  # from n / 2 on they are aliases
        return max(math.hypot(*waves), 1 / max(size))

    for place in product(*map(range, size)):
        expected = (frequency(0, 1) / frequency(*place)) ** exponent
        assert (power[place] / power[0, 1]).item() == pytest.approx(expected, rel=1e-5)


def test_pink_noise_of_a_picture_is_its_own():
    draw = partial(starting_noise, 3, shape=(2, 8, 8))
    torch.testing.assert_close(PinkNoise().noise(draw, 4)[:2], PinkNoise().noise(draw, 2))


# ---- CNO


def test_the_contrastive_loss_is_its_formula_and_zero_where_all_coincide():
    z, first, tau = starting_noise(1, 4, (6,)).double(), starting_noise(2, 4, (6,)).double(), 0.2
    cosine = torch.nn.functional.cosine_similarity
    gamma = 1 / (tau * math.log(3) + 1)
    expected = sum(gamma * math.log(sum(math.exp(cosine(z[i], z[j], dim=0) / tau) for j in range(4) if j != i))
                   - cosine(z[i], first[i], dim=0).item() / tau for i in range(4))
    assert contrastive(z, first, tau).item() == pytest.approx(expected)
    same_everywhere = z[:1].repeat(4, 1)
    assert contrastive(same_everywhere, same_everywhere, tau).item() == pytest.approx(0, abs=1e-9)


def test_one_step_of_cno_turns_two_noises_away_from_each_other_in_their_plane():
    # v = x / 2 at σ = 1: x̂₀ = x / 2, and the attraction to where one is has no gradient: what is left is the cosine's
    x = starting_noise(4, 2, (3, 4, 4))
    found = CNO(0.2, iterations=1, window=1).optimize(lambda x, sigma, step: x / 2, x, 1.0)
    a, b = x.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    down = -torch.stack([b / a.norm() / b.norm() - cosine * a / a.norm() ** 2,
                         a / a.norm() / b.norm() - cosine * b / b.norm() ** 2])
    moved = torch.stack([a, b]) + 0.2 * torch.stack([a, b]).norm() / down.norm() * down
    expected = moved * torch.stack([a, b]).norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=1e-4, atol=1e-5)


def test_cno_moves_nobody_alone_or_among_twins():
    x = starting_noise(4, 1, (3, 4, 4)).repeat(3, 1, 1, 1)
    assert torch.equal(CNO().optimize(lambda x, *_: 0 * x, x, 1.0), x)
    assert torch.equal(CNO().denoise(lambda x, *_: 0 * x, x[:1], torch.tensor([1.0, 0.0])), x[:1])


# ---- seed variance


def varied(strength, sigma=1.0, step=0, samples=200, seed=3, pooled=True, share=0.2):
    """What the transformer is given in a run of 10 steps, and what it would be."""
    context = torch.cat([starting_noise(1, 2, (6, 8)) * 3, torch.zeros(2, 2, 8)], dim=1).repeat_interleave(samples, 0)
    pooled, given = starting_noise(2, 2 * samples, (4,)) if pooled else None, []

    class Noted(GuidedVelocity):
        def __call__(self, x, sigma, step, guided=True):
            given.append(self.condition(len(x), sigma, step))

    velocity = Noted(None, lambda *_: (context, pooled), 10, seed=seed)
    SeedVariance(strength, share).velocity(velocity, torch.linspace(1, 0, 11))(torch.zeros(samples, 1), sigma, step)
    return given[0], (context, pooled)


def test_seed_variance_adds_uniform_noise_to_half_of_the_prompts_numbers():
    (context, pooled), (clean, clean_pooled) = varied(0.5)
    assert pooled is clean_pooled and torch.equal(context[:200], clean[:200])  # the unconditional branch
    assert torch.equal(context[:, 6:], clean[:, 6:])  # padding
    limit = 0.5 * clean[200, :6].std()
    noise = (context - clean)[200:, :6].flatten() / limit
    some = noise[noise != 0]  # 9,600 numbers: shares and moments within 5 standard errors
    assert abs(len(some) / len(noise) - 0.5) < 0.026 and 0.99 < some.abs().max() < 1.000001
    quarters = torch.histc(some, 4, -1, 1) / len(some)
    assert (quarters - 0.25).abs().max() < 0.032


def test_seed_variance_has_one_noise_for_all_early_steps_that_depends_on_seed_and_index():
    (context, _), (clean, _) = varied(0.5)
    assert torch.equal(varied(0.5, sigma=0.9, step=1)[0][0], context)
    assert torch.equal(varied(0.5, sigma=0.8, step=2)[0][0], clean)
    assert torch.equal(varied(0.5, samples=2)[0][0][2:], context[200:202])
    assert not torch.allclose(varied(0.5, seed=4)[0][0], context, atol=0.1)
    assert not torch.allclose(context[200], context[201], atol=0.1)
    assert varied(0.5, pooled=False)[0][1] is None  # FLUX.2


@pytest.mark.parametrize("method", [SeedVariance(), STRIDE(), CADS()], ids=lambda method: type(method).__name__)
def test_what_a_method_draws_follows_the_seed_of_the_run(pipeline, method):
    call = {"prompt": "a ring", "images": 2, "steps": 4, "noise": starting_noise(0, 2, (16, 16, 16)), "method": method}
    one, other = pipeline(**call, seed=1), pipeline(**call, seed=2)
    assert same(one, pipeline(**call, seed=1)) and not same(one, other)


# ---- first step from the teacher


@dataclass(frozen=True)
class First(Method):
    """Notes the first velocity of a run."""

    seen: list = ()

    def velocity(self, velocity, sigmas):
        def noted(x, sigma, step):
            v = velocity(x, sigma, step)
            self.seen.append(v)
            return v

        return noted


@pytest.mark.parametrize("weight", [None, 1.0, 5.0])
def test_the_first_velocity_is_that_of_the_teachers_own_pipeline(pipeline, weight):
    turbo, seen = Pipeline.load("tiny-turbo"), []

    class Noted(TeacherFirst):
        def velocity(self, velocity, sigmas):
            return First(seen=seen).velocity(super().velocity(velocity, sigmas), sigmas)

    turbo("a star", 3, seed=2, method=Noted(1.0, weight=weight))
    own = First(seen=[])
    pipeline("a star", 3, seed=2, method=own, guidance=weight)
    torch.testing.assert_close(seen[0], own.seen[0], rtol=1e-5, atol=1e-6)
    plain = First(seen=[])
    turbo("a star", 3, seed=2, method=plain)
    assert not torch.allclose(plain.seen[0], own.seen[0], atol=0.1)


def test_the_teacher_computes_in_the_dtype_of_the_few_step_model():
    turbo, seen = Pipeline.load("tiny-turbo", dtype=torch.float64), []

    class Noted(TeacherFirst):
        def of_teacher(self, velocity, x):
            taught = super().of_teacher(velocity, x)
            seen.extend({p.dtype for p in taught.transformer.module.parameters()})
            return taught

    turbo("a star", 1, method=Noted(1.0))
    assert seen == [torch.float64]


def test_the_teachers_steps_are_eulers_along_the_first_interval(pipeline):
    # with itself as teacher and as many steps as its schedule has above σ₁, the first interval is the old one in parts
    method = TeacherFirst(3.0, teacher="tiny-sd3", weight=1.0)
    noise = starting_noise(0, 2, (16, 16, 16))
    texts = pipeline.text("a ring")
    plain = GuidedVelocity(pipeline.parts["transformer"], lambda b, *_: tuple(t.expand(b, *t.shape[1:]) for t in texts),
                           4)
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    with torch.no_grad():
        x = noise
        for sigma in (1.0, 0.9, 0.8):
            x = x - 0.1 * plain(x, sigma, 0)
        found = noise - 0.3 * method.velocity(plain, sigmas)(noise, 1.0, 0)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_does_not_fit_is_named(tmp_path_factory):
    folder = tmp_path_factory.mktemp("klein") / "klein"
    small = saved(klein(), folder)[1]
    with pytest.raises(ValueError, match="the teacher tiny-sd3 has latent_channels 16, this model 32: give the model"):
        small("a cat", 1, steps=1, height=64, width=64, method=TeacherFirst())
    other = Pipeline.load("tiny-turbo")
    other.parts["transformer"].module.config = replace(other.config, context_dim=4096)  # as schnell beside tiny-sd3
    with pytest.raises(ValueError, match="the teacher tiny-sd3 has context_dim 128, this model 4096: give the model"):
        other("a cat", 1, method=TeacherFirst())


# ---- models as large ones are made: FLUX.2, with a reference, without and with guidance


@pytest.fixture(scope="module", params=[True, False], ids=["klein", "klein-base"])
def flux2(request, tmp_path_factory):
    name = "klein" if request.param else "klein-base"
    folder = tmp_path_factory.mktemp(name) / f"small-{name}"
    return saved(klein(is_distilled=request.param), folder)[1], folder, None if request.param else 3.0


@pytest.mark.parametrize("name", ["fsg", "dave", "stride", "coupled", "pink", "seedvariance", "teacher", "cno"])
def test_in_flux2_strength_0_is_plain_and_more_is_not(flux2, name):
    model, folder, guidance = flux2
    call = {"prompt": "a cat", "images": 2, "steps": 2, "height": 64, "width": 80, "guidance": guidance,
            "image": photo(80, 64)}
    method = METHODS[name]()
    if name == "teacher":
        if guidance:
            with pytest.raises(ValueError, match="TeacherFirst is for few-step models"):
                model(**call, method=method)
            return
        method = TeacherFirst(2.0, teacher=str(folder))
    plain = model(**call)
    assert same(model(**call, method=replace(method, strength=0.0)), plain)
    assert not same(model(**call, method=method), plain)


def test_cno_is_drawn_back_to_where_it_began(monkeypatch):
    firsts, own = [], cno.contrastive
    monkeypatch.setattr(cno, "contrastive", lambda z, first, tau: firsts.append(first) or own(z, first, tau))
    CNO(0.3, iterations=3).optimize(lambda x, *_: x / 2, starting_noise(4, 2, (3, 4, 4)), 1.0)
    assert len(firsts) == 3 and torch.equal(firsts[0], firsts[2])


def test_where_stride_and_when_feature_self_guidance_act():
    assert [*STRIDE().blocks(8)] == [0, 1] and [*STRIDE().blocks(2)] == [0]
    assert [FeatureSelfGuidance().acts_at(sigma, 0, 4) for sigma in (1.0, 0.8, 0.79)] == [True, True, False]
