"""The dose without a unit: `diversity` raises H by a share of what is left, whatever the tokens are."""

import math

import pytest
import torch

from repulsion import Repulsion, repel
from repulsion.objectives import OBJECTIVES, density_matrix
from repulsion.solvers import ascend_autograd


def tokens(spread, groups=1, samples=4, seed=0):
    """Samples around a common vector of their group."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(groups, 1, 5 * 24, generator=generator, dtype=torch.float64)
    apart = torch.randn(groups, samples, 5 * 24, generator=generator, dtype=torch.float64)
    return (common + spread * apart).reshape(groups * samples, 5, 24)


def value(batch, objective="vendi"):
    """H of one group by its definition: eigenvalues of the regularized kernel of unit vectors."""
    units = torch.nn.functional.normalize(batch.double().flatten(1), dim=-1)
    kernel = units @ units.T + 1e-4 * torch.eye(len(batch))
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.trace())
    return {
        "vendi": -(eigenvalues * eigenvalues.log()).sum(), "dpp": eigenvalues.log().sum(),
        "rke": -eigenvalues.square().sum().log(),
        "cosine": (1 - kernel.sum() / kernel.trace()) / (len(batch) - 1),
    }[objective].item()  # fmt: skip


HIGHEST = {"vendi": math.log(4), "dpp": -4 * math.log(4), "rke": math.log(4), "cosine": 0.0}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("spread", [1e-2, 0.1, 1.0])
@pytest.mark.parametrize("iterations", [1, 5])
def test_h_rises_by_the_share_of_what_is_left(objective, spread, iterations):
    batch = tokens(spread)
    before = value(batch, objective)
    for share in (0.1, 0.5, 0.9):
        after = value(repel(batch, None, iterations, diversity=share, objective=objective), objective)
        # solved for to 1e-7 of the rise; ε enters `value` as a kernel whose diagonal is 1 + ε: no difference in density
        assert (after - before) / (HIGHEST[objective] - before) == pytest.approx(share, rel=1e-6)


def test_small_steps_follow_the_same_curve_as_the_paper_s_loop():
    batch = tokens(0.1)
    goal = value(repel(batch, None, 1, diversity=0.3))
    low, high = 1.0, 1e6
    for _ in range(60):  # the η that reaches the same H
        middle = math.sqrt(low * high)
        low, high = (low, middle) if value(repel(batch, middle, 200)) > goal else (middle, high)
    loop = ascend_autograd(batch.reshape(1, 4, -1), low, 200, OBJECTIVES["vendi"], 1e-4).reshape(batch.shape)
    errors = []
    for iterations in (1, 4, 16):
        found = repel(batch, None, iterations, diversity=0.3)
        errors.append(((found - loop).norm() / (loop - batch).norm()).item())
    # Euler steps of either kind approach the gradient flow as 1 / M
    assert errors[0] < 0.3 and errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


def test_it_has_no_unit():
    batch = tokens(0.1)
    pushed = repel(batch, None, 3, diversity=0.4)
    for factor in (1e-3, 1e4):
        torch.testing.assert_close(repel(factor * batch, None, 3, diversity=0.4), factor * pushed, rtol=1e-6, atol=0)
    wider = torch.cat([batch, torch.zeros_like(batch)], dim=2)  # more dimensions, the same cosines
    torch.testing.assert_close(repel(wider, None, 3, diversity=0.4)[..., :24], pushed, rtol=1e-6, atol=1e-9)


def test_groups_are_dosed_apart_and_order_does_not_matter():
    near, far = tokens(0.01), tokens(1.0, seed=1)
    both = repel(torch.cat([near, far]), None, 2, diversity=0.3, groups=2)
    # each alone: the same up to where the search stops, 1e-7 of the rise
    torch.testing.assert_close(both[:4], repel(near, None, 2, diversity=0.3), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(both[4:], repel(far, None, 2, diversity=0.3), rtol=1e-6, atol=1e-8)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(repel(far[order], None, 2, diversity=0.3), both[4:][order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("closeness", [0, 0.01])
def test_a_share_out_of_reach_goes_to_the_peak(spread, closeness):
    batch = tokens(spread)
    batch[1] = batch[0] + closeness * (batch[1] - batch[0])  # (nearly) two of one kind, which one step cannot part
    before, share = value(batch), 0.95
    along = [ascend_autograd(batch.reshape(1, 4, -1), 10 ** (k / 40), 1, OBJECTIVES["vendi"], 1e-4)
             for k in range(-80, 480)]
    peak = max(value(moved.reshape(batch.shape)) for moved in along)
    assert peak < before + 0.9 * share * (math.log(4) - before)
    found = value(repel(batch, None, 1, diversity=share))
    # of lengths that double one lies within a third of the peak, where a parabola has 1 - 1/9 of its rise
    assert 0.8 * (peak - before) < found - before <= 1.01 * (peak - before)


def test_the_edges():
    batch = tokens(0.1)
    assert repel(batch, None, 3, diversity=0.0) is batch
    assert torch.equal(repel(batch[:1], None, 3, diversity=0.5), batch[:1])
    same = batch[:1].expand(4, -1, -1)
    assert torch.equal(repel(same, None, 3, diversity=0.5), same)  # no direction to leave in
    with pytest.raises(ValueError, match=r"tokens must be \(groups · B, N, D\).*got \(4, 0, 24\)"):
        repel(batch[:, :0], None, 3, diversity=0.5)
    twins = batch[[0, 0, 1, 2]]
    pushed = repel(twins, None, 3, diversity=0.2)
    torch.testing.assert_close(pushed[0], pushed[1], rtol=1e-9, atol=0)
    assert value(pushed) > value(twins)
    zero = batch.clone()
    zero[0] = 0
    assert (repel(zero, None, 3, diversity=0.2)[0] == 0).all()
    full = repel(batch, None, 10, diversity=1.0)  # a limit that no finite step reaches
    assert 0.99 * math.log(4) < value(full) <= math.log(4)
    opposite = torch.stack([batch[0], -batch[0]])  # past the goal already: nothing to do
    assert torch.isfinite(repel(opposite, None, 3, diversity=0.5)).all()


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "needs a scale or a diversity"), ({"scale": 1.0, "diversity": 0.5}, "not both"),
    ({"diversity": 1.5}, "diversity must be a number from 0 to 1, got 1.5"),
    ({"diversity": math.nan}, "diversity must be a number from 0 to 1, got nan"),
    ({"diversity": 0.5, "solver": "autograd"}, "solved for in Gram space"),
])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Repulsion(**settings)


def test_density_matrix_of_orthogonal_samples_is_the_highest():
    for name, objective in OBJECTIVES.items():
        orthogonal = objective(density_matrix(torch.eye(4, dtype=torch.float64), 1e-4)).item()
        assert orthogonal == pytest.approx(HIGHEST[name], abs=1e-12)
