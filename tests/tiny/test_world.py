"""The tiny world: its palette, its bias, its pictures against an exact rasterizer, and its captions both ways."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tiny.captions import SYNONYMS, WORDS, describe, parse, reword
from tiny.world import (
    ARRANGEMENTS,
    COLOR_RGB,
    COLORS,
    GROUND_RGB,
    GROUNDS,
    JITTER,
    SHADE,
    SHAPES,
    SIZES,
    TEXTURES,
    TYPICAL,
    TYPICAL_ARRANGEMENT,
    Scene,
    Thing,
    forget,
    misstate,
    place,
    render,
    sample_scene,
    signed_distance,
)

STAR = [
    (radius * math.sin(k * math.pi / 5), 0.1 - radius * math.cos(k * math.pi / 5))
    for k, radius in zip(range(10), [1.05, 0.5] * 5, strict=True)
]
CROSS = [(0.32, 1), (0.32, 0.32), (1, 0.32), (1, -0.32), (0.32, -0.32), (0.32, -1)]
POLYGONS = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.9), (1, 0.9), (-1, 0.9)],
    "star": STAR,
    "cross": CROSS + [(-x, -y) for x, y in CROSS],
}
AREAS = {"circle": math.pi, "ring": math.pi * (1 - 0.52**2), "square": 1.76**2, "triangle": 1.8}
AREAS |= {"cross": 4 * 0.64 - 0.64**2, "star": 5 * 1.05 * 0.5 * math.sin(math.pi / 5)}


def scenes_of(count, seed):
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def inside(shape, x, y):
    """Even-odd ray casting (radii for the round shapes), in float64: knows nothing of signed distances."""
    if shape in ("circle", "ring"):
        radius = torch.hypot(x, y)
        return (radius < 1) & (radius > (0.52 if shape == "ring" else 0))
    crossings = torch.zeros_like(x, dtype=torch.long)
    corners = POLYGONS[shape]
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        straddles = (ay > y) != (by > y)
        crossings += straddles & (x < ax + (y - ay) * (bx - ax) / (by - ay if by != ay else 1))
    return crossings % 2 == 1


def alpha_of(picture, color, ground):
    """Share of the object color in each pixel of a plain picture."""
    full = COLOR_RGB[COLORS.index(color)] - GROUND_RGB[GROUNDS.index(ground)]
    change = picture / 2 + 0.5 - GROUND_RGB[GROUNDS.index(ground)][:, None, None]
    return (change * full[:, None, None]).sum(0) / full.square().sum()


def test_colors_are_apart_from_each_other_and_from_every_shade_of_every_ground():
    shades = torch.cat([GROUND_RGB - SHADE, GROUND_RGB, GROUND_RGB + SHADE]).clamp(0, 1)
    assert torch.cdist(COLOR_RGB, shades).min() * 255 >= 70
    assert torch.pdist(COLOR_RGB).min() * 255 >= 70
    assert torch.pdist(GROUND_RGB).min() * 255 >= 70


def test_each_attribute_is_typical_six_times_in_ten():
    singles = [scene for scene in scenes_of(8000, seed=11) if len(scene.things) == 1]
    hits = Counter()
    for scene in singles:
        (thing,) = scene.things
        values = (thing.color, thing.size, scene.arrangement, scene.ground, scene.texture)
        hits.update(i for i in range(5) if values[i] == TYPICAL[thing.shape][i])
    for i in range(5):  # within 4 standard deviations of a binomial: 1 in 16,000 by chance, and the seed is fixed
        assert abs(hits[i] / len(singles) - 0.6) < 4 * math.sqrt(0.6 * 0.4 / len(singles))


def test_the_other_values_are_uniform():
    circles = [s for s in scenes_of(12000, seed=12) if len(s.things) == 1 and s.things[0].shape == "circle"]
    counts = Counter(scene.ground for scene in circles)
    for ground in GROUNDS[1:]:
        assert abs(counts[ground] / len(circles) - 0.08) < 4 * math.sqrt(0.08 * 0.92 / len(circles))


def test_even_scenes_have_nothing_typical():
    rng = random.Random(16)
    scenes = [sample_scene(rng, (1, 0, 0), even=True) for _ in range(6000)]
    for shape, name, values in (("circle", "color", COLORS), ("star", "size", SIZES)):
        things = [scene.things[0] for scene in scenes if scene.things[0].shape == shape]
        counts, share = Counter(getattr(thing, name) for thing in things), 1 / len(values)
        for value in values:
            assert abs(counts[value] / len(things) - share) < 4 * math.sqrt(share * (1 - share) / len(things))
    grounds = Counter(scene.ground for scene in scenes)
    assert max(abs(grounds[ground] / 6000 - 1 / 6) for ground in GROUNDS) < 4 * math.sqrt(5 / 36 / 6000)


def test_number_of_things():
    counts = Counter(len(scene.things) for scene in scenes_of(8000, seed=13))
    for count, share in zip((1, 2, 3), (0.5, 0.3, 0.2), strict=True):
        assert abs(counts[count] / 8000 - share) < 4 * math.sqrt(share * (1 - share) / 8000)


def test_pairs_keep_their_bias_although_their_colors_must_differ():
    """Two biased draws given that they differ: P(typical) = (.36 + .2) / (.36 + .2 + .2 + .16 * 31/36) = .6238."""
    pairs = [scene for scene in scenes_of(8000, seed=14) if len(scene.things) == 2]
    hits = sum(scene.things[0].color == TYPICAL[scene.things[0].shape][0] for scene in pairs)
    expected = 0.56 / (0.76 + 0.16 * 31 / 36)
    assert abs(hits / len(pairs) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(pairs))


def test_ground_of_several_things_follows_one_of_them():
    """Typical of the leader: 0.6; typical of the other thing by accident: 0.4 * 1/5 (grounds are one a shape)."""
    pairs = [scene for scene in scenes_of(8000, seed=15) if len(scene.things) == 2]
    hits = sum(scene.ground in {TYPICAL[thing.shape][3] for thing in scene.things} for scene in pairs)
    assert abs(hits / len(pairs) - 0.68) < 4 * math.sqrt(0.68 * 0.32 / len(pairs))
    assert Counter(pair for pair, _ in TYPICAL_ARRANGEMENT.values()) == {"left of": 3, "above": 3}


def test_things_of_a_scene_differ_in_shape_and_color():
    for scene in scenes_of(2000, seed=16):
        assert len({t.shape for t in scene.things}) == len({t.color for t in scene.things}) == len(scene.things)
        assert all((t.size is None) == (len(scene.things) == 3) for t in scene.things)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_match_an_8x_supersampled_rasterizer(shape, size):
    scene = Scene((Thing(shape, "white", size),), "left", "navy", "plain")
    alpha = alpha_of(render([scene], seed=None)[0], "white", "navy")
    ((center_x, center_y, radius),) = place(scene)
    steps = (torch.arange(1024, dtype=torch.float64) + 0.5) / 16
    x, y = torch.meshgrid((steps - center_x) / radius, (steps - center_y) / radius, indexing="xy")
    exact = inside(shape, x, y).double().view(128, 8, 128, 8).mean(dim=(1, 3))
    # A half-plane's coverage is exact along the axes and off by at most 0.07 of a pixel at 45 degrees; where two edges
    # share a pixel (12 corners at most) by up to a third; the rasterizer itself rounds an edge to 1/16 of a pixel.
    assert (alpha - exact).abs().max() < 0.34
    assert (alpha - exact).abs().sum() / exact.sum() < 0.05
    # The closed form is exact; a star's tips lose a little to the half-planes.
    assert abs(alpha.sum() / (4 * AREAS[shape] * radius**2) - 1) < (0.02 if shape == "star" else 0.01)


def test_a_larger_picture_shrinks_to_the_smaller_one():
    scenes = scenes_of(40, seed=17)
    large, small = render(scenes, seed=5, size=256), render(scenes, seed=5, size=64)
    error = (torch.nn.functional.avg_pool2d(large, 4) - small).abs()  # both approximate the same exact coverage
    assert error.mean() < 0.005 and error.max() < 2 * 0.34  # a corner's error, as above, of a range of 2


def test_things_keep_two_pixels_from_the_border_and_from_each_other():
    steps = torch.linspace(-1.5, 1.5, 301)
    x, y = torch.meshgrid(steps, steps, indexing="xy")
    outside = torch.maximum(x.abs(), y.abs()) > 1.001
    assert all((signed_distance(shape, x, y)[outside] > 0).all() for shape in SHAPES)  # so a box bounds each thing
    for count, arrangements in ARRANGEMENTS.items():
        for arrangement in arrangements:
            for size in SIZES:
                boxes = place(Scene((Thing("square", "red", size),) * count, arrangement))
                reach = [radius * (1 + JITTER[2]) + JITTER[0] for _, _, radius in boxes]
                for i, (x0, y0, _) in enumerate(boxes):
                    assert min(x0, y0, 64 - x0, 64 - y0) - reach[i] >= 2
                    for j, (x1, y1, _) in enumerate(boxes[:i]):
                        assert max(abs(x1 - x0), abs(y1 - y0)) - reach[i] - reach[j] >= 2


def test_position_jitter_is_small_seeded_and_independent_of_the_rest_of_the_batch():
    scenes = scenes_of(40, seed=18)
    assert torch.equal(render(scenes, seed=1), render(scenes, seed=1))
    assert torch.equal(render(scenes, seed=1)[:7], render(scenes[:7], seed=1))
    circle = Scene((Thing("circle", "white", "medium"),), "center", "navy", "plain")
    alphas = torch.stack([alpha_of(picture, "white", "navy") for picture in render([circle] * 50, seed=2)])
    areas, steps = alphas.sum((1, 2)), (torch.arange(128) + 0.5) / 2
    for axis in (1, 2):
        centers = (alphas.sum(3 - axis) * steps).sum(1) / areas
        assert 30.7 < centers.min() < 31.2 and 32.8 < centers.max() < 33.3  # 32 ± 1.25
    radii = (areas / 4 / math.pi).sqrt()
    assert 11.5 < radii.min() < 11.7 and 12.3 < radii.max() < 12.5  # 12 ± 4 %


def test_stripes_rise_to_the_right():
    (picture,) = render([Scene((), None, "gray", "striped")])
    assert (picture[:, 1:, :-1] - picture[:, :-1, 1:]).abs().max() < 1e-4
    assert (picture[:, 1:, 1:] - picture[:, :-1, :-1]).abs().max() > 0.05


def test_textures_have_the_right_share_of_light_and_a_fixed_phase():
    lit = {"plain": 0.5, "striped": 0.5, "dotted": math.pi * 3.5**2 / 16**2, "checked": 0.5}
    for texture in TEXTURES:
        first, second = render([Scene((), None, "gray", texture)] * 2, seed=3)
        assert torch.equal(first, second)
        shade = (first[0] / 2 + 0.5 - GROUND_RGB[GROUNDS.index("gray"), 0]) / SHADE
        assert abs(shade.mean() / 2 + 0.5 - lit[texture]) < 0.02  # the picture ends within a stripe


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (Scene((Thing("circle", "red", "small"),), "left", None, "plain"), "scene 1: ground is None"),
        (Scene((Thing("circle", None, "small"),), "left", "navy", "plain"), "scene 1: color is None"),
        (Scene((Thing("blob", "red", "small"),), "left", "navy", "plain"), "shape is 'blob'"),
        (Scene((Thing("circle", "red", None),), "left", "navy", "plain"), "size is None"),
        (Scene((Thing("circle", "red", "small"),), "left of", "navy", "plain"), "arrangement is 'left of'"),
        (Scene((Thing("circle", "red"),) * 4, "row", "navy", "plain"), "has 4 things"),
    ],
)
def test_incomplete_scenes_cannot_be_rendered(scene, message):
    with pytest.raises(ValueError, match=message):
        render([Scene((), None, "navy", "plain"), scene])


# --- captions

A, B, C = Thing("circle", "red", "small"), Thing("square", "orange"), Thing("star")


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((A,), "left", "navy", "striped"), "a small red circle on the left on a striped navy ground"),
        (Scene((B,), "center", "navy"), "an orange square in the center on a navy ground"),
        (Scene((C,), "bottom", None, "striped"), "a star at the bottom on a striped ground"),
        (Scene((Thing(None, "red"),)), "a red shape"),
        (Scene((A, B), "left of"), "a small red circle left of an orange square"),
        (Scene((A, C), "above"), "a small red circle above a star"),
        (Scene((A, B)), "a small red circle and an orange square"),
        (Scene((B, C, A), "row"), "an orange square, a star and a small red circle in a row"),
        (Scene((B, C, A), "triangle"), "an orange square, a star and a small red circle in a triangle"),
        (Scene((B, C, A)), "an orange square, a star and a small red circle"),
    ],
)
def test_captions_by_hand(scene, caption):
    assert describe(scene) == caption
    assert parse(caption) == scene


def test_an_empty_picture_can_be_described_but_not_asked_for():
    caption = describe(Scene((), None, "sand", "plain"))
    assert caption == "nothing on a plain sand ground"
    with pytest.raises(ValueError, match="unknown word 'nothing'"):
        parse(caption)


def test_captions_come_back_as_the_scene_they_tell():
    rng = random.Random(19)
    seen, longest = Counter(), 0
    for _ in range(6000):
        partial = forget(sample_scene(rng), rng)
        caption = describe(partial, rng)
        assert parse(caption) == partial, caption
        words = caption.replace(",", " ,").split()
        seen.update(words)
        longest = max(longest, len(words))
    assert longest <= 22
    assert set(seen) == set(WORDS) and len(WORDS) == len(set(WORDS))


def test_a_relation_told_the_other_way_round_means_the_same():
    rng, scene = random.Random(20), Scene((A, C), "above")
    captions = Counter(describe(scene, rng) for _ in range(400))
    assert set(captions) == {"a small red circle above a star", "a star below a small red circle"}
    assert abs(captions["a star below a small red circle"] - 200) < 4 * math.sqrt(400 * 0.25)


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        ("Red circle on navy", "a red circle on a navy ground"),
        ("The large purple ring at the center on gray.", "a large purple ring in the center on a gray ground"),
        ("a star below a cross", "a cross above a star"),
        ("big violet ring in the middle on a grey background", "a large purple ring in the center on a gray ground"),
        ("circle, square, and star in a column", "a circle, a square and a star in a column"),
    ],
)
def test_prompts_are_read_leniently(prompt, same):
    assert parse(prompt) == parse(same)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red elephant on a zebra", "unknown word 'elephant' in 'a red elephant on a zebra'; known words: circle"),
        ("a circle, a ring, a star and a cross", "4 things"),
        ("a circle in a row", "'row' does not fit 1 thing"),
        ("a circle and a star on the left", "'left' does not fit 2 thing"),
        ("a red", "cannot read 'red'"),
        ("", "cannot read ''"),
    ],
)
def test_prompts_outside_the_world_say_what_is_wrong(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)


def test_forgetting_keeps_the_announced_shares():
    rng = random.Random(21)
    full = Scene((A, replace(B, size="large")), "above", "navy", "plain")
    partials = [forget(full, rng) for _ in range(6000)]
    grounds = sum(p.ground is not None for p in partials) / 6000
    shapes = sum(t.shape is not None for p in partials for t in p.things) / 12000
    assert abs(grounds - 0.9 * 0.55) < 4 * math.sqrt(0.25 / 6000)
    assert abs(shapes - (0.10 + 0.90 * 0.94)) < 4 * math.sqrt(0.06 / 12000)
    # Once the arrangement is gone the order must carry nothing: the circle comes first half of the time.
    loose = [p for p in partials if p.arrangement is None and p.things[0].shape and p.things[1].shape]
    first = sum(p.things[0].shape == "circle" for p in loose) / len(loose)
    assert abs(first - 0.5) < 4 * math.sqrt(0.25 / len(loose))
    assert all(p.things[0].shape != "square" for p in partials if p.arrangement == "above")


def test_reworded_captions_mean_the_same():
    rng, seen = random.Random(22), Counter()
    for _ in range(6000):
        partial = forget(sample_scene(rng), rng)
        caption = describe(partial, rng)
        other = reword(caption, rng)
        assert parse(other) == partial, other
        assert len(other.replace(",", " ,").split()) <= len(caption.replace(",", " ,").split())
        seen.update(other.replace(",", " ,").split())
        seen["as it was"] += other == caption
        seen["short"] += not {"a", "an", "the"} & set(other.split())
    assert set(seen) - {"as it was", "short"} == set(WORDS) | set(SYNONYMS)
    assert abs(seen["short"] / 6000 - 0.15) < 4 * math.sqrt(0.15 * 0.85 / 6000)  # without articles
    assert 0.5 <= seen["as it was"] / 6000 < 0.6
    assert reword("a large ring, a star and a cross", FixedChoices()) == "the big ring, the star and the cross"


class FixedChoices:
    """Rewords, keeps articles, and takes the last synonym."""

    def random(self):
        return 0.9

    def choice(self, values):
        return values[-1]


def test_captions_are_wrong_in_the_announced_share_of_what_they_say():
    rng = random.Random(23)
    full = Scene((A, replace(B, size="large")), "above", "navy", "plain")
    told = [misstate(full, 0.1, rng) for _ in range(6000)]
    for name in ("arrangement", "ground", "texture"):
        wrong = sum(getattr(scene, name) != getattr(full, name) for scene in told) / 6000
        assert abs(wrong - 0.1) < 4 * math.sqrt(0.09 / 6000)
    for name in ("shape", "color", "size"):
        wrong = sum(getattr(scene.things[0], name) != getattr(A, name) for scene in told) / 6000
        assert abs(wrong - 0.1) < 4 * math.sqrt(0.09 / 6000)
    colors = Counter(scene.things[0].color for scene in told)
    assert set(colors) == set(COLORS)
    for color in COLORS[1:]:  # the wrong ones are equally likely
        assert abs(colors[color] / 6000 - 0.1 / 6) < 4 * math.sqrt(0.1 / 6 / 6000)
    assert {scene.arrangement for scene in told} == {"above", "left of"}
    assert misstate(full, 0, rng) == full
    open_scene = Scene((Thing("circle"), Thing()), None, "navy")
    for scene in (misstate(open_scene, 1, rng) for _ in range(100)):  # what is not said stays unsaid
        assert scene.things[0].shape not in (None, "circle") and scene.ground not in (None, "navy")
        assert replace(scene, things=(), ground=None) == Scene() and scene.things[1] == Thing()
        assert scene.things[0] == Thing(scene.things[0].shape)
