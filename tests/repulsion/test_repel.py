"""Both solvers against the gradient written out by hand, against each other in float64, and at the edges."""

import math

import pytest
import torch

from repulsion import repel, vendi_score
from repulsion.objectives import NAMES, OBJECTIVES, density_matrix
from repulsion.repel import gram_matrix
from repulsion.solvers import ascend_autograd, mixing_matrix

REG = 1e-4


def alike(b=4, n=6, d=32, spread=0.03, seed=0, dtype=torch.float64):
    """Tokens as in a model: one common part, small differences; cosines around 0.999."""
    torch.manual_seed(seed)
    return (torch.randn(1, n, d, dtype=torch.float64) + spread * torch.randn(b, n, d, dtype=torch.float64)).to(dtype)


def relative(found, expected, start):
    """Error of the displacement, relative to the displacement."""
    return ((found - expected).norm() / (expected - start).norm()).item()


def entropy_gradient_by_hand(c):
    """∂H/∂c_i of Eq. 3 and 4 from eigenpairs, vectors (B, D): the derivation in the docstring of `gradient_matrix`."""
    b = len(c)
    r = 1 / c.norm(dim=1)
    cosines = (c @ c.T) * r[:, None] * r[None, :]
    values, u = torch.linalg.eigh((cosines + REG * torch.eye(b).double()) / (b * (1 + REG)))
    w = -(u * (values.log() + 1)) @ u.T / (b * (1 + REG))
    gradient = torch.zeros_like(c)
    for i in range(b):
        for j in range(b):
            if i != j:
                gradient[i] += 2 * r[i] * w[i, j] * (r[j] * c[j] - cosines[i, j] * r[i] * c[i])
    return gradient


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_one_step_follows_the_gradient_written_by_hand(solver):
    tokens = alike()
    scale = 1e-3
    step = (repel(tokens, scale, 1, solver=solver) - tokens).flatten(1) / scale
    expected = entropy_gradient_by_hand(tokens.flatten(1))
    # float64; the cosines of 0.999 lose three digits to cancellation, the difference quotient another three
    assert ((step - expected).norm() / expected.norm()).item() < 1e-9


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_derivative_of_each_objective_is_that_of_its_value(objective):
    f, derivative = OBJECTIVES[objective]
    kernel = torch.nn.functional.normalize(alike(spread=0.5).flatten(1), dim=1)
    density = density_matrix(kernel @ kernel.T, torch.eye(4).double(), REG)[None].requires_grad_()
    (expected,) = torch.autograd.grad(f(density).sum(), density)
    found = torch.from_numpy(derivative(density.detach().numpy()))
    off_diagonal = 1 - torch.eye(4)  # K_ii is 1 whatever the samples are: what the derivative has there is not used
    assert ((found - (expected + expected.mT) / 2) * off_diagonal).norm() < 1e-12 * expected.norm()


LENGTHS = [{"scale": 0.1}, {"scale": 10.0}, {"scale": 1e3}, {"strength": 0.1}, {"strength": 1.0}, {"strength": 4.0}]


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("length", LENGTHS, ids=str)
def test_gram_space_ends_where_the_loop_over_the_tokens_ends(objective, length):
    if objective == "spread" and length.get("scale", 0) > 1:
        length = {"scale": length["scale"] / 1e3}  # of c − mean c itself, whose factor grows to (1 + η / M)^M
    tokens, length = alike(), {"scale": None} | length
    expected = repel(tokens, iterations=30, objective=objective, solver="autograd", **length)
    found = repel(tokens, iterations=30, objective=objective, solver="gram", **length)
    # float64 on both sides; the kernel's small eigenvalues keep about 12 digits, 30 steps may add up
    assert relative(found, expected, tokens) < 1e-10


def test_gram_solver_at_flux_size_is_exact_to_1e_5_for_float32_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(1, 512, 3072) + 0.03 * torch.randn(4, 512, 3072)
    found = repel(tokens, 1e6, 50).double()  # moves the tokens by 14 % of their length
    wide = tokens.flatten(1)[None].double()
    expected = ascend_autograd(wide, None, 1e6, 50, "vendi", REG)[0].view_as(tokens)
    # what is left is rounding the result to float32 once: 6e-8 / sqrt(12) of the tokens, over 0.14
    assert relative(found, expected, tokens) < 1e-6


@pytest.mark.parametrize("dtype,rounding", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12), (torch.float32, 2**-25)])
def test_low_precision_tokens_are_rounded_once_and_only_at_the_end(dtype, rounding):
    tokens = alike(spread=0.3, dtype=dtype)
    exact = repel(tokens.double(), 100.0, 20)
    found = repel(tokens, 100.0, 20)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 1.01 * rounding * 2 * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_rises_and_so_does_the_vendi_score(objective):
    tokens = alike()
    repelled = repel(tokens, 50.0, 20, objective=objective)

    def value(t):
        vectors = t.flatten(1)
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        return OBJECTIVES[objective][0](density_matrix(unit @ unit.T, torch.eye(4).double(), REG)).item()

    assert value(repelled) > value(tokens)
    assert vendi_score(repelled.flatten(1)) > vendi_score(tokens.flatten(1))


def test_objectives_have_their_closed_forms():
    b = 3
    identity = torch.eye(b).double()
    mixed, pure = identity / b, density_matrix(torch.ones(b, b).double(), identity, 1e-12)
    for name, most, least in (("vendi", math.log(b), 0), ("rke", math.log(b), 0), ("cosine", 0, -1)):
        assert OBJECTIVES[name][0](mixed).item() == pytest.approx(most, abs=1e-10)
        assert OBJECTIVES[name][0](pure).item() == pytest.approx(least, abs=1e-9)
    assert OBJECTIVES["dpp"][0](mixed).item() == pytest.approx(-b * math.log(b), rel=1e-12)


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_groups_do_not_see_each_other(solver):
    first, second = alike(seed=1), 100 * alike(seed=2)
    together = repel(torch.cat([first, second]), 20.0, 10, groups=2, solver=solver)
    apart = torch.cat([repel(first, 20.0, 10, solver=solver), repel(second, 20.0, 10, solver=solver)])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_order_of_the_batch_does_not_matter(solver):
    tokens, order = alike(b=5), [3, 1, 4, 0, 2]
    torch.testing.assert_close(repel(tokens[order], 20.0, 10, solver=solver),
                               repel(tokens, 20.0, 10, solver=solver)[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_scaling_all_tokens_by_a_scales_the_step_like_eta_over_a_squared(solver):
    tokens = alike()  # H has no length, so its gradient is of degree −1: a c + η g(c) / a = a (c + η / a² g(c))
    torch.testing.assert_close(repel(7 * tokens, 49 * 20.0, 10, solver=solver),
                               7 * repel(tokens, 20.0, 10, solver=solver), rtol=1e-9, atol=0)


def test_samples_that_all_coincide_stay():
    tokens = alike(b=1).expand(4, -1, -1)
    assert torch.equal(repel(tokens, 1e3, 20), tokens)
    assert torch.equal(repel(tokens.float() * torch.tensor([1, 2, 4, 8.0])[:, None, None], 1e6, 50),
                       tokens.float() * torch.tensor([1, 2, 4, 8.0])[:, None, None])  # the same direction
    torch.testing.assert_close(repel(tokens, 1.0, 5, solver="autograd"), tokens, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_twins_move_alike(solver):
    tokens = alike(b=4)
    tokens[2] = tokens[0]
    repelled = repel(tokens, 50.0, 20, solver=solver)
    torch.testing.assert_close(repelled[2], repelled[0], rtol=1e-6, atol=1e-9)
    assert (repelled[0] - tokens[0]).norm() > 1e-3 * tokens[0].norm()


@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_zero_vector_stays_and_repels_no_sample(solver):
    tokens = alike(b=4)
    tokens[1] = 0
    repelled = repel(tokens, 20.0, 10, solver=solver)
    assert (repelled[1] == 0).all()
    direction = (repelled - tokens)[0]  # a combination of the three others, so none of it is new
    basis = torch.linalg.qr(tokens[[0, 2, 3]].flatten(1).T).Q
    rest = direction.flatten() - basis @ (basis.T @ direction.flatten())
    assert rest.norm() < 1e-9 * direction.norm()


def test_nothing_to_do_gives_the_very_same_tokens():
    tokens = alike(b=3)
    assert repel(tokens, 0.0, 10) is tokens
    assert repel(tokens, 5.0, 10, groups=3) is tokens  # groups of one


def test_works_and_leaves_no_graph_under_every_autograd_mode():
    tokens = alike()
    expected = repel(tokens, 20.0, 5)
    with torch.no_grad():
        assert torch.equal(repel(tokens, 20.0, 5), expected)
    with torch.inference_mode():
        made_inside = tokens * 1
        assert torch.equal(repel(made_inside, 20.0, 5), expected)
        assert torch.equal(repel(made_inside, 20.0, 5, solver="autograd"), repel(tokens, 20.0, 5, solver="autograd"))
    assert not expected.requires_grad


def test_long_tokens_are_summed_in_chunks():
    torch.manual_seed(0)
    tokens = torch.randn(2, 3, 101, 1 << 12)  # more than the chunk of 65,536 numbers, no multiple of it
    wide = tokens.flatten(2).double()
    torch.testing.assert_close(torch.from_numpy(gram_matrix(tokens)), wide @ wide.mT, rtol=1e-12, atol=1e-6)


def test_mixing_starts_at_zero():
    gram = gram_matrix(alike()[None])
    for strength, scale in ((None, 0.0), (0.0, None)):
        assert (mixing_matrix(gram, strength, scale, 5, "vendi", REG)[0] == 0).all()


@pytest.mark.parametrize("change,message", [
    ({"scale": -1.0}, "scale must be a finite number, 0 or more, got -1.0"),
    ({"scale": math.inf}, "scale must be a finite number"),
    ({"scale": math.nan}, "scale must be a finite number"),
    ({"strength": 1.0}, "needs a strength or a scale, not both"), ({"scale": None}, "needs a strength or a scale"),
    ({"scale": None, "strength": -0.5}, "strength must be a finite number, 0 or more, got -0.5"),
    ({"scale": None, "strength": math.nan}, "strength must be a finite number"),
    ({"iterations": 0}, "iterations must be at least 1"),
    ({"objective": "entropy"}, "objective must be one of vendi, dpp, rke, cosine, spread, got 'entropy'"),
    ({"solver": "newton"}, "solver must be one of gram, autograd, got 'newton'"),
    ({"kernel_reg": 0.0}, "kernel_reg must be"),
    ({"groups": 3}, r"tokens must be \(groups · B, N, D\), floating point, with groups = 3, got \(4, 6, 32\)"),
])  # fmt: skip
def test_bad_settings_are_named(change, message):
    settings = {"scale": 1.0, "iterations": 5} | change
    with pytest.raises(ValueError, match=message):
        repel(alike(), settings.pop("scale"), settings.pop("iterations"), **settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", ["gram", "autograd"])
def test_non_finite_tokens_are_refused(bad, solver):
    tokens = alike()
    tokens[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        repel(tokens, 1.0, 5, solver=solver)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \(groups · B, N, D\).*got \(4, 0, 32\)"):
        repel(alike()[:, :0], 1.0, 5)


def test_integer_tokens_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        repel(torch.ones(4, 2, 3, dtype=torch.int64), 1.0, 5)
