"""A small, biased world of captioned pictures: what the tiny text-to-image checkpoints were trained on.

A scene is one to three shapes on a colored, textured ground. Every attribute has a value that is typical for its shape
(circles tend to be red, in the center, on plain navy), so a model trained here learns both to follow a prompt and to
fill in what the prompt leaves open with the same typical value every time: the bias that repulsion counteracts.

A *complete* scene specifies every attribute; in a *partial* one, as a caption gives it, some are None (unspecified).
Letters in shape comments: b batch. Lengths are in units of 1/64 of a picture's side, whatever its size in pixels.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

SIDE = 128  # pixels of a picture, unless another size is asked for
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
SIZES = ("small", "medium", "large")
GROUNDS = ("navy", "pink", "teal", "gray", "brown", "sand")
TEXTURES = ("plain", "striped", "dotted", "checked")
ARRANGEMENTS = {  # by number of things
    1: ("left", "right", "top", "bottom", "center"), 2: ("left of", "above"), 3: ("row", "column", "triangle"),
}  # fmt: skip

COLOR_RGB = torch.tensor(
    [(220, 30, 40), (255, 140, 15), (252, 228, 40), (45, 185, 50), (35, 85, 240), (140, 40, 200), (252, 252, 252)]
) / 255
GROUND_RGB = torch.tensor(
    [(30, 32, 85), (228, 155, 185), (25, 120, 125), (128, 128, 132), (100, 62, 40), (202, 188, 124)]
) / 255
SHADE = 0.1  # the two shades of a textured ground are this much lighter and darker than the plain one

TYPICAL = {  # shape: (color, size, position, ground, texture)
    "circle": ("red", "medium", "center", "navy", "plain"),
    "square": ("blue", "large", "left", "pink", "striped"),
    "triangle": ("green", "small", "top", "sand", "dotted"),
    "star": ("yellow", "large", "right", "teal", "plain"),
    "cross": ("white", "small", "bottom", "brown", "checked"),
    "ring": ("purple", "medium", "center", "gray", "striped"),
}
TYPICAL_ARRANGEMENT = {  # shape: (of two things, of three things), for the shape that determines it
    "circle": ("left of", "row"), "square": ("above", "column"), "triangle": ("above", "triangle"),
    "ring": ("left of", "row"), "cross": ("above", "column"), "star": ("left of", "triangle"),
}  # fmt: skip
P_TYPICAL = 0.6
P_COUNT = (0.5, 0.3, 0.2)  # one, two, three things

# By number of things, in the order of SIZES; three things are all of one size, which no caption mentions.
RADII = {1: (8.0, 12.0, 17.0), 2: (6.5, 9.0, 11.5), 3: (7.5, 7.5, 7.5)}
CENTERS = {  # of several things, in canonical order
    "left of": ((16, 32), (48, 32)), "row": ((11.5, 32), (32, 32), (52.5, 32)),
    "above": ((32, 16), (32, 48)), "column": ((32, 11.5), (32, 32), (32, 52.5)),
    "triangle": ((32, 17), (16, 47), (48, 47)),
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
MARGIN = 4.0  # a single thing on a side ends this far from the border
JITTER = (1.25, 1.25, 0.04)  # x and y in pixels, radius as a share: with these, gaps stay at 2 pixels or more


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; None is unspecified (or, for the size of three things, not applicable)."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """Things with their arrangement and ground; None is unspecified.

    Order of things when an arrangement is given: "left of": left first; "above": top first; "row": left to right;
    "column": top to bottom; "triangle": top, bottom left, bottom right. A complete scene thus has one form.
    """

    things: tuple[Thing, ...] = ()
    arrangement: str | None = None
    ground: str | None = None
    texture: str | None = None


def biased(rng: random.Random, typical: str, values: Sequence[str]) -> str:
    """`typical` with probability P_TYPICAL, else one of the other `values`, with equal probability."""
    if rng.random() < P_TYPICAL:
        return typical
    return rng.choice([value for value in values if value != typical])


def sample_scene(rng: random.Random, counts: Sequence[float] = P_COUNT, even: bool = False) -> Scene:
    """A complete scene from the biased world; things of one scene differ in shape and in color.

    Color and size follow each thing's own shape; arrangement, ground and texture that of one thing drawn at random.
    `even`: nothing is typical, every value has the same probability.
    """
    def draw(typical: str, values: Sequence[str]) -> str:
        return rng.choice(values) if even else biased(rng, typical, values)

    count = rng.choices((1, 2, 3), counts)[0]
    shapes = rng.sample(SHAPES, count)
    colors = []
    while len(set(colors)) < count:
        colors = [draw(TYPICAL[shape][0], COLORS) for shape in shapes]
    sizes = [draw(TYPICAL[shape][1], SIZES) if count < 3 else None for shape in shapes]
    leader = rng.choice(shapes)
    _, _, position, ground, texture = TYPICAL[leader]
    arrangement = position if count == 1 else TYPICAL_ARRANGEMENT[leader][count - 2]
    return Scene(
        tuple(map(Thing, shapes, colors, sizes)),
        draw(arrangement, ARRANGEMENTS[count]),
        draw(ground, GROUNDS),
        draw(texture, TEXTURES),
    )


def forget(scene: Scene, rng: random.Random) -> Scene:
    """A partial copy of a complete `scene`, for a training caption.

    10 % keep the shapes alone, else each attribute is kept with probability 0.55 and a shape with 0.94. Things are
    shuffled if their arrangement is dropped: their order has no meaning then.
    """
    keep, keep_shape = (0.0, 1.0) if rng.random() < 0.1 else (0.55, 0.94)

    def maybe(value, probability=keep):
        return value if rng.random() < probability else None

    things = [Thing(maybe(t.shape, keep_shape), maybe(t.color), maybe(t.size)) for t in scene.things]
    partial = Scene(tuple(things), maybe(scene.arrangement), maybe(scene.ground), maybe(scene.texture))
    if partial.arrangement is None:
        rng.shuffle(things)
    return replace(partial, things=tuple(things))


def misstate(partial: Scene, share: float, rng: random.Random) -> Scene:
    """A copy of a partial scene in which each specified attribute has, with probability `share`, another value.

    Captions on the web are wrong now and then; a model that was trained on such captions needs guidance.
    """

    def maybe(value: str | None, values: Sequence[str]) -> str | None:
        wrong = value is not None and rng.random() < share
        return rng.choice([other for other in values if other != value]) if wrong else value

    things = [Thing(maybe(t.shape, SHAPES), maybe(t.color, COLORS), maybe(t.size, SIZES)) for t in partial.things]
    arrangement = maybe(partial.arrangement, ARRANGEMENTS.get(len(things), ()))
    return Scene(tuple(things), arrangement, maybe(partial.ground, GROUNDS), maybe(partial.texture, TEXTURES))


def place(scene: Scene) -> list[tuple[float, float, float]]:
    """Center x, y (down) and radius of each thing of a complete scene, before jitter."""
    count = len(scene.things)
    radii = [RADII[count][SIZES.index(thing.size or "medium")] for thing in scene.things]
    if count == 1:
        reach = 32 - MARGIN - radii[0]
        centers = [tuple(32 + reach * step for step in DIRECTIONS[scene.arrangement])]
    else:
        centers = CENTERS[scene.arrangement] if count else ()
    return [(x, y, radius) for (x, y), radius in zip(centers, radii, strict=True)]


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a `shape` of radius 1 at the origin, negative inside; x right, y down.

    Near corners it is the distance to the nearer edge's line, which suffices for anti-aliasing.
    All shapes fit in the square from -1 to 1, and fill it in at least one direction or nearly so.
    """
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.76).abs() - 0.24
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if shape == "cross":
        long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - 1, short - 0.32)
    if shape == "triangle":  # corners (0, -0.9), (-1, 0.9), (1, 0.9)
        return torch.maximum((1.8 * x.abs() - y - 0.9) / math.hypot(1.8, 1), y - 0.9)
    # star: fold the plane into one wedge of 36 degrees, which runs from a tip (radius 1.05) to an inner corner (0.5)
    y = y - 0.1
    radius, wedge = torch.hypot(x, y), math.tau / 5
    angle = torch.remainder(torch.atan2(x, -y) + wedge / 2, wedge) - wedge / 2
    along, aside = radius * angle.cos(), radius * angle.sin().abs()
    inner_along, inner_aside = 0.5 * math.cos(wedge / 2), 0.5 * math.sin(wedge / 2)
    edge = (inner_along - 1.05, inner_aside)
    return ((along - 1.05) * edge[1] - aside * edge[0]) / math.hypot(*edge)


def pixel_grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel centers x, y, each (size, size), in units of a 64-pixel picture."""
    steps = (torch.arange(size) + 0.5) * (64 / size)
    return tuple(torch.meshgrid(steps, steps, indexing="xy"))


def coverage(distance: Tensor, size: int = SIDE) -> Tensor:
    """Share of each pixel that lies inside, from the signed distance (64-pixel units) of its center."""
    return (0.5 - distance * (size / 64)).clamp(0, 1)


def texture_sheets(size: int = SIDE) -> Tensor:
    """Lightness pattern of each of TEXTURES, (4, size, size): 0 plain, -1 dark shade, +1 light shade; fixed phase."""
    x, y = pixel_grid(size)
    diagonal = torch.remainder((x + y) / math.sqrt(2), 16)
    stripes = coverage((diagonal - 8).abs() - 4, size)  # 8 wide, every 16
    dots = coverage(torch.hypot(torch.remainder(x, 16) - 8, torch.remainder(y, 16) - 8) - 3.5, size)
    checks = ((x // 8 + y // 8) % 2).float()
    return torch.stack([torch.full_like(x, 0.5), stripes, dots, checks]) * 2 - 1


@cache
def ground_sheets(size: int) -> Tensor:
    """Every textured ground without things, (grounds, textures, 3, size, size) in [0, 1]."""
    return (GROUND_RGB[:, None, :, None, None] + SHADE * texture_sheets(size)[None, :, None]).clamp(0, 1)


def render(scenes: Sequence[Scene], seed: int | None = 0, size: int = SIDE) -> Tensor:
    """Pictures of complete scenes, (b, 3, size, size) float32 in [-1, 1], anti-aliased.

    Position and radius jitter a little by `seed` and the scene's index in the batch; None places things exactly.
    Raises ValueError for a partial scene.
    """
    for index, scene in enumerate(scenes):
        check_complete(scene, index)
    grounds = [GROUNDS.index(scene.ground) for scene in scenes]
    textures = [TEXTURES.index(scene.texture) for scene in scenes]
    pictures, (x, y) = ground_sheets(size)[grounds, textures], pixel_grid(size)

    jitter = torch.zeros(len(scenes), 3, 3)  # picture, thing, (x, y, radius)
    if seed is not None:
        jitter = jitter.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed)) * torch.tensor(JITTER)
    places = [place(scene) for scene in scenes]
    for slot in range(3):
        for shape in SHAPES:  # all pictures whose thing in this slot has this shape, at once
            rows = [i for i, s in enumerate(scenes) if len(s.things) > slot and s.things[slot].shape == shape]
            if not rows:
                continue
            center_x, center_y, radius = torch.tensor([places[i][slot] for i in rows]).T[:, :, None, None]
            shift_x, shift_y, stretch = jitter[rows, slot].T[:, :, None, None]
            radius = radius * (1 + stretch)
            distance = signed_distance(shape, (x - center_x - shift_x) / radius, (y - center_y - shift_y) / radius)
            color = COLOR_RGB[[COLORS.index(scenes[i].things[slot].color) for i in rows]]
            alpha = coverage(distance * radius, size)
            pictures[rows] = torch.lerp(pictures[rows], color[:, :, None, None], alpha[:, None])
    return pictures * 2 - 1


def check_complete(scene: Scene, index: int) -> None:
    """Raise ValueError unless the scene is complete and its values are known."""
    count = len(scene.things)
    if count > 3:
        raise ValueError(f"scene {index} has {count} things; a picture holds at most 3")
    wanted = [("ground", scene.ground, GROUNDS), ("texture", scene.texture, TEXTURES)]
    wanted += [("arrangement", scene.arrangement, ARRANGEMENTS[count])] if count else []
    for thing in scene.things:
        wanted += [("shape", thing.shape, SHAPES), ("color", thing.color, COLORS)]
        wanted += [("size", thing.size, SIZES)] if count < 3 else []
    for name, value, values in wanted:
        if value not in values:
            raise ValueError(f"scene {index}: {name} is {value!r}; to render it, choose one of {', '.join(values)}")


def count_attributes(scenes: Sequence[Scene]) -> dict[str, dict[str, int]]:
    """How often each value of each attribute occurs in the scenes, the most frequent first."""
    found = {name: Counter() for name in ("shape", "color", "size", "arrangement", "ground", "texture")}
    for scene in scenes:
        for name, counter in found.items():
            values = [getattr(part, name) for part in (scene, *scene.things) if hasattr(part, name)]
            counter.update(value for value in values if value is not None)
    return {name: dict(counter.most_common()) for name, counter in found.items() if counter}
