"""What the experiments measure, against hand-made cases and closed forms."""

import math
from itertools import combinations, product

import pytest
import torch
from scenes import scenes_of

from benchmarks.paper import embedding, measures
from benchmarks.paper.embedding import Embedding
from repulsion import vendi_score
from tiny.drawing import WELL, wrong_pixels
from tiny.reader import attribute_vectors
from tiny.world import Scene, Thing, render

NAVY = ("center", "navy", "plain")


def test_a_scene_survives_as_text():
    scenes = scenes_of(200, seed=1) + [Scene(), Scene((Thing("star", None, "small"),), None, "pink", None)]
    assert [measures.to_scene(measures.to_text(scene)) for scene in scenes] == scenes


def test_wrong_pixels_are_those_that_were_spoiled():
    # On fresh renders the fit is near exact: half of the pictures have none. A block of a color that the ground
    # is not, too small to pass for a thing (the reader's least is 100 pixels), counts pixel by pixel.
    pictures = render(scenes_of(100, seed=2), seed=3)
    fresh = torch.tensor(wrong_pixels(pictures)).double()
    assert fresh.median() == 0 and fresh.mean() < 5
    plain = render([Scene((Thing("circle", "red", "medium"),), *NAVY)] * 3)
    for i, side in enumerate((2, 3, 4)):
        plain[i, :, 4 : 4 + side, 4 : 4 + side] = 1
    assert wrong_pixels(plain) == pytest.approx([1e4 * count / 128**2 for count in (4, 9, 16)])


def test_half_a_percent_of_wrong_pixels_is_the_limit_of_well_drawn():
    plain = render([Scene((Thing("circle", "red", "medium"),), *NAVY)] * 2)
    plain[:, :, 4:12, 4:12] = 1
    plain[1, :, 4:12, 100:108] = 1
    assert [count <= WELL for count in wrong_pixels(plain)] == [True, False]  # 39 and 78 of 10,000


def test_a_torn_thing_counts_about_what_it_lacks():
    whole = render([Scene((Thing("square", "white", "large"),), *NAVY)], seed=None)
    torn = whole.clone()
    torn[:, :, 64:, 64:] = whole[:, :, :1, :1]  # a quarter of 60 x 60 pixels gone
    (found,) = wrong_pixels(torn)
    assert wrong_pixels(whole) == [0] and 0.5 * 900 < found * 128**2 / 1e4 < 2 * 900


def test_coverage_counts_what_the_prompt_leaves_open():
    circle = [Scene((Thing("circle", color, "small"),), "left", "navy", "plain") for color in ("red", "blue")]
    # colors 2 of 7, sizes 1 of 3, arrangements 1 of 5, grounds 1 of 6, textures 1 of 4
    assert measures.values_reached("a circle", circle) == pytest.approx((2 / 7 + 1 / 3 + 1 / 5 + 1 / 6 + 1 / 4) / 5)
    reached = measures.values_reached("a circle on a plain navy ground", circle)
    assert reached == pytest.approx((2 / 7 + 1 / 3 + 1 / 5) / 3)
    assert measures.values_reached("a small red circle on the left on a plain navy ground", circle) == 1


def test_vendi_of_pairs_runs_from_one_to_two():
    one, other = scenes_of(1, seed=4)[0], Scene((Thing("star", "blue", "small"), Thing("ring", "red", "large")))
    assert measures.vendi_of_pairs([one] * 4) == pytest.approx(1)
    strangers = [Scene((Thing(shape, color, size),), place, ground, texture) for shape, color, size, place, ground,
                 texture in (("star", "red", "small", "left", "navy", "plain"),
                             ("ring", "blue", "large", "top", "pink", "dotted"))]
    # all but the number of things differ, one attribute of seven: λ = 1/2 ± 1/14
    high, low = 0.5 + 0.5 / 7, 0.5 - 0.5 / 7
    assert measures.vendi_of_pairs(strangers) == pytest.approx(math.exp(-high * math.log(high) - low * math.log(low)))
    assert measures.vendi_of_pairs([one, one, other]) < 2
    many = scenes_of(6, seed=8)
    each = [vendi_score(attribute_vectors(pair)).item() for pair in combinations(many, 2)]
    assert measures.vendi_of_pairs(many) == pytest.approx(sum(each) / 15, rel=1e-9)


def test_kid_is_the_unbiased_sum_over_pairs():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), 2 + torch.randn(4, 3, dtype=torch.float64)

    def k(a, b):
        return (a.dot(b).item() / 3 + 1) ** 3

    own = sum(k(x[i], x[j]) for i, j in product(range(5), range(5)) if i != j) / 20
    other = sum(k(y[i], y[j]) for i, j in product(range(4), range(4)) if i != j) / 12
    across = sum(k(a, b) for a, b in product(x, y)) / 20
    assert measures.kernel_distance(x, y) == pytest.approx(own + other - 2 * across, rel=1e-12)


def test_kid_of_one_world_is_small_and_of_two_is_not():
    embed = Embedding.load()
    one, two = (embed(render(scenes_of(300, seed=s), seed=s)).double() for s in (5, 6))
    circles = [s for s in scenes_of(3000, seed=7) if len(s.things) == 1 and s.things[0].shape == "circle"][:200]
    same = measures.kernel_distance(one, two)
    different = measures.kernel_distance(one, embed(render(circles)).double())
    assert abs(same) < 0.1 and different > 10 * abs(same)


def test_the_embedding_can_be_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "FILE", tmp_path / "embedding.pt")
    embedding.main(steps=2, file=embedding.FILE)
    vectors = Embedding.load()(render(scenes_of(500, seed=8)))
    # over renders each number has mean 0 and deviation 1, up to 500 samples' error and the rounding to 16 bits
    assert vectors.mean(0).abs().max() < 0.3 and (vectors.std(0) - 1).abs().max() < 0.3


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_mean_is_that_of_a_stratified_sample():
    by_prompt = [3 + i + (1 + i) * normal(n, 1, seed=i) for i, n in enumerate((2, 5, 9))]
    value, low, high = measures.interval(by_prompt, lambda m: m[..., 0])
    assert value == pytest.approx(sum(g.mean().item() for g in by_prompt) / 3)
    variance = sum(g.var().item() / len(g) for g in by_prompt) / 3**2
    assert high - value == pytest.approx(1.96 * variance**0.5) and value - low == pytest.approx(high - value)


def test_the_interval_of_a_ratio_is_that_of_its_linearization():
    # R = ΣA / ΣB varies as the mean of (a − R b) / mean B, to first order: Cochran, Sampling Techniques, ch. 6
    by_prompt = [torch.tensor([2.0 + i, 2.0]) + 0.3 * normal(50, 2, seed=i) for i in range(20)]
    value, low, high = measures.interval(by_prompt, lambda m: m[..., 0] / m[..., 1])
    below = sum(g[:, 1].mean() for g in by_prompt) / 20
    variance = sum(((g[:, 0] - value * g[:, 1]) / below).var() / 50 for g in by_prompt) / 20**2
    assert high - low == pytest.approx(2 * 1.96 * variance.item() ** 0.5, rel=0.01)  # the second order: 1 / 50


def test_the_interval_covers_the_truth_nineteen_times_of_twenty():
    truth, hits = [1.0, 2.0, 4.0], 0
    for trial in range(400):
        groups = [t + normal(10, 1, seed=3 * trial + i) for i, t in enumerate(truth)]
        _, low, high = measures.interval(groups, lambda m: m[..., 0])
        hits += low <= sum(truth) / 3 <= high
    assert 0.92 <= hits / 400 <= 0.98  # binomial: 0.95 ± 0.022, less a little for 30 numbers


def test_with_one_group_a_prompt_the_interval_is_over_the_prompts():
    values = normal(20, 1, 1)
    value, _, high = measures.interval(list(values), lambda m: m[..., 0])
    assert high - value == pytest.approx(1.96 * values.std().item() / 20**0.5)
    several = [normal(4, 1, seed=i) for i in range(20)]
    means = torch.stack([g.mean() for g in several])
    value, _, high = measures.interval(measures.over_prompts(several), lambda m: m[..., 0])
    assert high - value == pytest.approx(1.96 * means.std().item() / 20**0.5)
    assert measures.interval([torch.full((3, 2), 5.0)] * 4, lambda m: m[..., 0] / m[..., 1]) == (1, 1, 1)
    assert math.isnan(measures.interval([normal(1, 1)], lambda m: m[..., 0])[1])  # one number has no spread
