"""`strength`: a push of a given length relative to the tokens, without a unit, and the control that needs no kernel."""

import pytest
import torch
from torch.nn import functional as F

from repulsion import repel
from repulsion.objectives import NAMES

SOLVERS = pytest.mark.parametrize("solver", ["gram", "autograd"])
OBJECTIVE = pytest.mark.parametrize("objective", NAMES)


def tokens(spread, groups=1, samples=4, seed=0):
    """Samples around a common vector of their group."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(groups, 1, 5 * 24, generator=generator, dtype=torch.float64)
    apart = torch.randn(groups, samples, 5 * 24, generator=generator, dtype=torch.float64)
    return (common + spread * apart).reshape(groups * samples, 5, 24)


def push(batch, strength, iterations=1, **settings):
    return repel(batch, None, iterations, strength=strength, **settings)


@SOLVERS
@OBJECTIVE
@pytest.mark.parametrize("spread", [1e-2, 0.1, 1.0])
@pytest.mark.parametrize("strength", [0.5, 1.0, 4.0])
def test_one_step_is_strength_times_as_long_as_the_group(solver, objective, spread, strength):
    batch = tokens(spread)
    moved = push(batch, strength, solver=solver, objective=objective) - batch
    assert moved.norm().item() == pytest.approx(strength * batch.norm().item(), rel=1e-9)


def test_the_direction_is_the_gradient_s():
    batch = tokens(0.1)
    along, step = repel(batch, 1e-3, 1) - batch, push(batch, 2.0) - batch
    assert F.cosine_similarity(along.flatten(), step.flatten(), dim=0).item() == pytest.approx(1, abs=1e-9)


@SOLVERS
def test_every_step_of_several_is_as_long_and_follows_a_gradient_taken_anew(solver):
    batch = tokens(0.1)
    expected = batch
    for _ in range(3):  # a step of 1/3 each, relative to the tokens where the push starts
        expected = push(expected, 1.5 / 3 * (batch.norm() / expected.norm()).item(), solver=solver)
    found = push(batch, 1.5, 3, solver=solver)
    assert (found - expected).norm() < 1e-9 * expected.norm()
    assert (push(batch, 1.5, 1) - found).norm() > 1e-2 * found.norm()  # the gradient turns on the way


@SOLVERS
def test_spread_leads_straight_away_from_the_mean(solver):
    batch = tokens(0.1)
    away = batch - batch.mean(0)
    for iterations in (1, 5):  # the direction never changes, so the number of steps does not matter
        found = push(batch, 0.7, iterations, objective="spread", solver=solver)
        torch.testing.assert_close(found, batch + 0.7 * batch.norm() / away.norm() * away, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(repel(batch, 0.3, 1, objective="spread", solver=solver), batch + 0.3 * away,
                               rtol=1e-9, atol=1e-12)


@OBJECTIVE
def test_it_has_no_unit(objective):
    batch = tokens(0.1)
    pushed = push(batch, 0.8, 3, objective=objective)
    for factor in (1e-3, 1e4):
        torch.testing.assert_close(push(factor * batch, 0.8, 3, objective=objective), factor * pushed,
                                   rtol=1e-9, atol=0)
    wider = torch.cat([batch, torch.zeros_like(batch)], dim=2)  # more dimensions, the same cosines
    torch.testing.assert_close(push(wider, 0.8, 3, objective=objective)[..., :24], pushed, rtol=1e-9, atol=1e-12)


@SOLVERS
def test_groups_are_measured_apart_and_order_does_not_matter(solver):
    near, far = tokens(0.01), 100 * tokens(1.0, seed=1)
    both = push(torch.cat([near, far]), 1.0, 2, groups=2, solver=solver)
    torch.testing.assert_close(both[:4], push(near, 1.0, 2, solver=solver), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both[4:], push(far, 1.0, 2, solver=solver), rtol=1e-9, atol=1e-9)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(push(far[order], 1.0, 2, solver=solver), both[4:][order], rtol=1e-9, atol=1e-9)


@SOLVERS
@OBJECTIVE
def test_where_all_coincide_none_moves(solver, objective):
    same = tokens(0.1)[:1].expand(4, -1, -1)
    torch.testing.assert_close(push(same, 2.0, 3, objective=objective, solver=solver), same, rtol=1e-6, atol=0)
    zero = torch.zeros(4, 5, 24, dtype=torch.float64)
    assert torch.equal(push(zero, 2.0, objective=objective, solver=solver), zero)


@OBJECTIVE
def test_two_samples_that_barely_differ_part_along_their_difference(objective):
    pair = tokens(0.1, samples=2)
    pair[1] = pair[0] + 1e-6 * torch.randn(5, 24, generator=torch.Generator().manual_seed(3)).double()
    moved = push(pair, 0.5, objective=objective) - pair
    # their cosine is 1 − 5e-13: the Gram matrix keeps three digits of what it lacks to 1
    across = (pair[1] - pair[0]).flatten()
    if objective != "spread":  # a cosine changes across the vectors alone
        across = across - (across @ pair[0].flatten()) / pair[0].flatten().square().sum() * pair[0].flatten()
    assert F.cosine_similarity(moved[1].flatten(), across, dim=0) > 0.99
    assert F.cosine_similarity(moved[0].flatten(), across, dim=0) < -0.99
    assert moved.norm().item() == pytest.approx(0.5 * pair.norm().item(), rel=1e-2)


def test_the_edges():
    batch = tokens(0.1)
    assert push(batch, 0.0, 3) is batch
    assert push(batch[:1], 0.5) is not None and torch.equal(push(batch[:1], 0.5), batch[:1])
    twins = batch[[0, 0, 1, 2]]
    pushed = push(twins, 0.3, 3)
    torch.testing.assert_close(pushed[0], pushed[1], rtol=1e-9, atol=0)
    zero = batch.clone()
    zero[0] = 0
    assert (push(zero, 0.3, 3)[0] == 0).all()
