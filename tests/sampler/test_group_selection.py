"""Group selection: the best group against brute force, pruning, and that the chosen are who they were alone."""

import itertools

import pytest
import torch
from test_pipeline import pixels

from sampler import Pipeline, starting_noise
from sampler.methods import GroupSelection, sgi


def value(group, quality, distance):
    group = torch.as_tensor(group)
    return quality[group].sum() + distance[group][:, group].sum() / 2


@pytest.mark.parametrize("m,size", [(6, 3), (8, 4), (9, 2), (5, 5)])
def test_the_chosen_group_is_the_best_of_all(m, size, monkeypatch):
    gap = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        quality = torch.rand(m, generator=generator, dtype=torch.float64)
        points = torch.randn(m, 3, generator=generator, dtype=torch.float64)
        distance = torch.cdist(points, points)
        best = max(value(group, quality, distance) for group in itertools.combinations(range(m), size))
        exact = sgi.best_group(quality, distance, size)
        assert value(exact, quality, distance).item() == pytest.approx(best.item(), rel=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(sgi, "EXACT", 1)
            swapped = sgi.best_group(quality, distance, size)
        assert len(set(swapped.tolist())) == size and swapped.tolist() == sorted(swapped.tolist())
        gap.append(1 - (value(swapped, quality, distance) / best).item())
    assert min(gap) > -1e-12 and max(gap) < 0.05 and sum(g > 1e-9 for g in gap) <= 4  # greedy and swaps: nearly always


def test_quality_and_diversity_are_weighed():
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]).view(4, 2, 1, 1)
    assert GroupSelection().choose(x, 2, 0).tolist() == [0, 3]  # opposite
    picky = GroupSelection(quality=lambda x: torch.tensor([5.0, 4, 0, 0]))
    assert picky.choose(x, 2, 0).tolist() == [0, 1]
    assert GroupSelection(balance=100, quality=picky.quality).choose(x, 2, 0).tolist() == [0, 3]
    assert GroupSelection(features=lambda x: x[:, 1:] - 0.5).choose(x, 2, 0).tolist() == [0, 2]  # the second number


@pytest.mark.parametrize("pruning,sizes", [(0.5, [9, 5, 4, 4]), (0.9, [4, 4, 4, 4]), (0.0, [17, 17, 17, 4])])
def test_candidates_are_pruned_to_the_pictures_asked_for(pruning, sizes):
    method, x, found = GroupSelection(3.25, pruning=pruning), starting_noise(0, 17, (4, 2, 2)), []
    assert method.noise(lambda count: torch.zeros(count), 4).shape == (17,)
    for left in (3, 2, 1, 0):
        kept = method.choose(x, 4, left)
        x = x if kept is None else x[kept]
        found.append(len(x))
    assert found == sizes


def test_chosen_pictures_are_to_the_bit_those_of_their_seeds(monkeypatch):
    # in float64, whose sums in another order, for another batch size, do not reach a picture's 8 bits
    pipeline, kept, choose = Pipeline.load("tiny-sd3", dtype=torch.float64), [torch.arange(8)], GroupSelection.choose

    def spy(*arguments, **named):
        found = choose(*arguments, **named)
        if found is not None:
            kept.append(kept[-1][found])
        return found

    monkeypatch.setattr(GroupSelection, "choose", spy)
    found = pipeline("a ring", 2, seed=2, steps=4, method=GroupSelection(3.0))
    assert [len(indices) for indices in kept] == [8, 4, 2]
    noise = starting_noise(2, 8, (16, 16, 16))
    for picture, index in zip(found, kept[-1], strict=True):
        alone = pixels(pipeline("a ring", 1, noise=noise[index : index + 1], steps=4))
        assert (alone == pixels([picture])).all()
