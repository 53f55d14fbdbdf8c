"""Group selection: the best group against brute force, pruning, and that the chosen are who they were alone."""

import itertools

import pytest
import torch
from test_pipeline import pixels

from sampler import Pipeline, sigmas, starting_noise
from sampler.methods import GroupSelection, sgi


def value(group, distance):
    group = torch.as_tensor(group)
    return distance[group][:, group].sum() / 2


@pytest.mark.parametrize("m,size", [(6, 3), (8, 4), (9, 2), (5, 5)])
def test_the_chosen_group_is_the_best_of_all(m, size, monkeypatch):
    gap = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(m, 3, generator=generator, dtype=torch.float64)
        distance = torch.cdist(points, points)
        best = max(value(group, distance) for group in itertools.combinations(range(m), size))
        exact = sgi.best_group(distance, size)
        assert value(exact, distance).item() == pytest.approx(best.item(), rel=1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(sgi, "EXACT", 1)
            swapped = sgi.best_group(distance, size)
        assert len(set(swapped.tolist())) == size and swapped.tolist() == sorted(swapped.tolist())
        gap.append(1 - (value(swapped, distance) / best).item())
    assert min(gap) > -1e-12 and max(gap) < 0.05 and sum(g > 1e-9 for g in gap) <= 4  # greedy and swaps: nearly always


def test_the_most_different_are_chosen():
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]).view(4, 2, 1, 1)
    assert GroupSelection().choose(x, 2, 0).tolist() == [0, 3]  # opposite


@pytest.mark.parametrize("pruning,sizes", [(0.5, [9, 5, 4, 4]), (0.9, [4, 4, 4, 4]), (0.0, [17, 17, 17, 4])])
def test_candidates_are_pruned_to_the_pictures_asked_for(pruning, sizes):
    method, x, found = GroupSelection(3.25, pruning=pruning), starting_noise(0, 17, (4, 2, 2)), []
    assert method.noise(lambda count: torch.zeros(count), 4).shape == (17,)
    for left in (3, 2, 1, 0):
        x = x[method.choose(x, 4, left)]
        found.append(len(x))
    assert found == sizes


def test_chosen_pictures_are_to_the_bit_those_of_their_seeds(monkeypatch):
    # in float64, whose sums in another order, for another batch size, do not reach a picture's 8 bits
    pipeline, kept, choose = Pipeline.load("tiny-sd3", dtype=torch.float64), [torch.arange(8)], GroupSelection.choose

    def spy(*arguments, **named):
        found = choose(*arguments, **named)
        kept.append(kept[-1][found])
        return found

    monkeypatch.setattr(GroupSelection, "choose", spy)
    found = pipeline("a ring", 2, seed=2, steps=4, method=GroupSelection(3.0))
    assert [len(indices) for indices in kept] == [8, 4, 2, 2, 2]
    noise = starting_noise(2, 8, (16, 16, 16))
    for picture, index in zip(found, kept[-1], strict=True):
        alone = pixels(pipeline("a ring", 1, noise=noise[index : index + 1], steps=4))
        assert (alone == pixels([picture])).all()


def test_candidates_are_judged_by_the_pictures_predicted_of_them(monkeypatch):
    noise, image, seen = starting_noise(0, 4, (4, 2, 2)), starting_noise(1, 4, (4, 2, 2)), []
    monkeypatch.setattr(GroupSelection, "choose", lambda self, predicted, *_, **__: seen.append(predicted) or slice(4))
    GroupSelection(1.0).denoise(lambda x, *_: noise - image, noise, sigmas(3))
    for predicted in seen:
        torch.testing.assert_close(predicted, image, rtol=1e-5, atol=1e-5)  # float32, on the straight line
    assert len(seen) == 3
