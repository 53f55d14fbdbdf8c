"""The pixel reader: on fresh renders, through blur and noise, on pictures drawn by Pillow, and its two measures."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from tiny.reader import adherence, attribute_vectors, read
from tiny.world import Scene, Thing, render, sample_scene


def scenes_of(count, seed):
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(count)]


def blur(pictures, sigma):
    steps = torch.arange(-4, 5.0)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    return F.conv2d(F.pad(pictures, (4,) * 4, mode="replicate"), kernel.expand(3, 1, 9, 9), groups=3)


def attributes(scene):
    whole = [len(scene.things), scene.arrangement, scene.ground, scene.texture]
    return whole + [value for thing in scene.things for value in (thing.shape, thing.color, thing.size)]


def tensor_of(image):
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("condition", ["fresh", "blurred and noisy"])
def test_reads_what_was_rendered(condition):
    scenes = scenes_of(512, seed=9101)
    pictures = torch.cat([render(scenes[i : i + 64], 91000 + i) for i in range(0, len(scenes), 64)])
    if condition != "fresh":
        pictures = blur(pictures, 0.8) + 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(91))
    found = read(pictures)
    whole = sum(a == b for a, b in zip(scenes, found, strict=True)) / len(scenes)
    told = [
        (value, i < len(attributes(b)) and attributes(b)[i] == value)
        for a, b in zip(scenes, found, strict=True)
        for i, value in enumerate(attributes(a))
    ]
    right = sum(ok for _, ok in told) / len(told)
    print(f"\n{condition}: {right:.2%} of attributes, {whole:.2%} of whole scenes")
    assert right >= 0.998 and whole >= 0.985


def test_shifted_colors_and_smooth_stains_do_not_mislead():
    scenes, generator = scenes_of(128, seed=9102), torch.Generator().manual_seed(92)
    pictures = blur(render(scenes, seed=92000), 0.8)
    shifted = pictures + 0.06 * torch.randn(len(scenes), 3, 1, 1, generator=generator)
    stains = F.interpolate(torch.randn(len(scenes), 3, 8, 8, generator=generator), size=128, mode="bicubic")
    for spoilt in (shifted, pictures + 0.08 * stains):
        assert sum(a == b for a, b in zip(scenes, read(spoilt), strict=True)) / len(scenes) >= 0.985


def test_each_picture_is_read_by_itself():
    pictures = render(scenes_of(100, seed=9103), seed=93000)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(93))
    found = read(pictures)
    assert read(pictures[order]) == [found[i] for i in order.tolist()]
    assert read(pictures[40:41]) == found[40:41]


def test_a_mirrored_picture_is_read_as_the_mirrored_scene():
    mirror = {"left": "right", "right": "left"}
    scenes = [replace(scene, texture="plain") for scene in scenes_of(300, seed=9104)]  # textures have a handed phase
    for scene, found in zip(scenes, read(render(scenes, seed=94000).flip(-1)), strict=True):
        things, arrangement = scene.things, mirror.get(scene.arrangement, scene.arrangement)
        if arrangement in ("left of", "row"):
            things = things[::-1]
        if arrangement == "triangle":
            things = (things[0], things[2], things[1])
        assert found == replace(scene, things=things, arrangement=arrangement)


def test_reads_a_picture_drawn_by_another_program():
    """Pillow, without anti-aliasing: a large orange disk at the right, a small green one on the left; teal ground."""
    image = Image.new("RGB", (128, 128), (25, 120, 125))
    draw = ImageDraw.Draw(image)
    draw.ellipse((74, 42, 118, 86), fill=(255, 140, 15))
    draw.rectangle((20, 52, 42, 74), fill=(45, 185, 50))
    (found,) = read(tensor_of(image)[None])
    small, large = Thing("square", "green", "small"), Thing("circle", "orange", "large")
    assert found == Scene((small, large), "left of", "teal", "plain")


def test_a_diamond_is_not_a_circle():
    image = Image.new("RGB", (128, 128), (25, 120, 125))
    draw = ImageDraw.Draw(image)
    draw.ellipse((16, 48, 48, 80), fill=(220, 30, 40))
    draw.polygon([(96, 44), (116, 64), (96, 84), (76, 64)], fill=(252, 252, 252))
    (found,) = read(tensor_of(image)[None])
    circle, diamond = Thing("circle", "red", "medium"), Thing(None, "white", "medium")
    assert found == Scene((circle, diamond), "left of", "teal", "plain")


def test_of_more_than_three_things_the_largest_count():
    image = Image.new("RGB", (128, 128), (30, 32, 85))
    draw = ImageDraw.Draw(image)
    colors = [(220, 30, 40), (252, 228, 40), (45, 185, 50), (252, 252, 252)]
    for i, (color, half) in enumerate(zip(colors, (12, 6, 12, 10), strict=True)):
        draw.rectangle((16 + 32 * i - half, 64 - half, 16 + 32 * i + half, 64 + half), fill=color)
    (found,) = read(tensor_of(image)[None])
    assert [thing.color for thing in found.things] == ["red", "green", "white"] and found.arrangement == "row"


def discs(*places):
    image = Image.new("RGB", (128, 128), (25, 120, 125))
    for x, y, color in places:
        ImageDraw.Draw(image).ellipse((x - 16, y - 16, x + 16, y + 16), fill=color)
    return read(tensor_of(image)[None])[0]


def test_what_has_no_name_is_none():
    red, white, yellow = (220, 30, 40), (252, 252, 252), (252, 228, 40)
    assert discs((24, 24, red)).arrangement is None  # in a corner
    assert discs((64, 64, (255, 0, 255))).things[0].color is None
    assert discs((30, 30, red), (98, 64, white), (98, 104, yellow)).arrangement is None  # neither a row nor a triangle


def test_specks_are_no_things():
    (picture,) = render([Scene((Thing("circle", "red", "medium"),), "center", "navy", "plain")])
    picture[:, 4:12, 4:12] = 1  # 64 pixels: the smallest thing of the world has 260
    assert len(read(picture[None])[0].things) == 1


def test_garbage_is_read_without_complaint():
    generator = torch.Generator().manual_seed(95)
    noise = torch.randn(8, 3, 64, 64, generator=generator)
    assert len(read(noise)) == len(read(noise * float("inf"))) == 8
    assert read(noise[:0]) == []
    assert all(scene.things == () for scene in read(torch.full((1, 3, 20, 30), float("nan"))))
    magenta = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    assert read(magenta)[0].ground is None


def test_only_batches_of_rgb_pictures_can_be_read():
    with pytest.raises(ValueError, match=r"\(3, 64, 64\); expected \(batch, 3, height, width\)"):
        read(torch.zeros(3, 64, 64))


# --- measures

A, B, C = Thing("circle", "red", "small"), Thing("square", "blue", "large"), Thing("star", "white", "small")
PAIR = Scene((A, B), "left of", "navy", "plain")


@pytest.mark.parametrize(
    ("prompted", "found", "share"),
    [
        (PAIR, PAIR, 1),
        (PAIR, replace(PAIR, ground="pink"), 9 / 10),
        (PAIR, replace(PAIR, things=(B, A)), 9 / 10),  # the right things, the wrong way round
        (PAIR, replace(PAIR, arrangement="above"), 9 / 10),
        (PAIR, replace(PAIR, things=(B, A), arrangement="above"), 9 / 10),
        (Scene((A, B)), replace(PAIR, things=(B, A)), 1),  # order is open
        (Scene((A, B)), Scene((B,), "left", "navy", "plain"), 3 / 7),  # the count and the circle's three are missing
        (Scene((A,)), PAIR, 3 / 4),  # one thing too many
        (Scene((Thing("circle"),)), Scene((Thing("ring", "red"),)), 1 / 2),
        (Scene((Thing(None, "red"), Thing("star", "red"))), Scene((Thing("star", "red"), Thing("ring", "red"))), 1),
        (Scene((A, B, C), "row"), Scene((B, A, C), "row"), 10 / 11),
        (Scene((A,), "left", "navy"), Scene(), 0),
        (Scene((Thing(),)), Scene((Thing(),)), 1),  # "a shape" asks for the count alone
        (Scene((Thing("circle"),)), Scene((Thing(),)), 1 / 2),  # what could not be read is not there
    ],
)
def test_adherence_by_hand(prompted, found, share):
    assert adherence(prompted, found) == pytest.approx(share, abs=1e-12)


def vendi(rows):
    eigenvalues = torch.linalg.eigvalsh(rows @ rows.T / len(rows)).clamp(min=1e-30)
    return torch.exp(-(eigenvalues * eigenvalues.log()).sum()).item()


def test_pictures_that_share_everything_or_nothing():
    same = attribute_vectors([PAIR] * 4)
    assert torch.allclose(same @ same.T, torch.ones(4, 4, dtype=torch.float64), atol=1e-12)
    assert vendi(same) == pytest.approx(1, abs=1e-9)
    other = Scene((Thing("ring", "green", "medium"),), "top", "pink", "dotted")
    third = Scene((C, Thing("cross", "yellow"), Thing("triangle", "purple")), "row", "gray", "checked")
    rows = attribute_vectors([other, third])
    assert torch.allclose(rows @ rows.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    assert vendi(rows) == pytest.approx(2, abs=1e-9)


def test_things_that_are_not_there_are_shared_too():
    """Beside a picture of three things, two of one thing have count, arrangement and two empty slots in common."""
    three = Scene((Thing("circle", "red"),) * 3, "row", "navy", "plain")
    rows = attribute_vectors([three, Scene((A,), "left", "pink", "dotted"), Scene((B,), "left", "gray", "checked")])
    assert (rows[1] @ rows[2]).item() == pytest.approx(6 / 11)  # 4 of the frame, 3 + 2 + 2 of slots: no size in 2 and 3


def test_dot_products_are_shares_of_common_attributes():
    scenes = [scene for scene in scenes_of(60, seed=9105) if len(scene.things) == 2][:10]
    rows = attribute_vectors(scenes)
    for i, a in enumerate(map(attributes, scenes)):
        for j, b in enumerate(map(attributes, scenes)):
            share = sum(x == y for x, y in zip(a, b, strict=True)) / 10
            assert (rows[i] @ rows[j]).item() == pytest.approx(share, abs=1e-12)


def test_the_vendi_score_of_two_pictures_follows_their_share():
    """Eigenvalues of [[1, s], [s, 1]] / 2 are (1 +- s) / 2; here 9 of 10 attributes are shared."""
    rows = attribute_vectors([PAIR, replace(PAIR, ground="pink")])
    high, low = torch.tensor(0.95), torch.tensor(0.05)
    assert vendi(rows) == pytest.approx(torch.exp(-(high * high.log() + low * low.log())).item(), rel=1e-6)


def test_no_scenes_have_no_vectors():
    with pytest.raises(ValueError, match="no scenes"):
        attribute_vectors([])
