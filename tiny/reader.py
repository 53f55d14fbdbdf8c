"""Reads a picture of the tiny world back into the scene it shows, without a network.

Every ground, texture, color and shape is known, so a picture is analyzed in four steps: find the ground sheet that fits
best, the pixels that are a blend of that sheet and an object color, their connected components, and for each component
the shape whose silhouette of the same area and centroid overlaps it most. It works on renders and generated pictures.

Letters in shape comments: b batch, s slots (up to three things a picture), t things found in the whole batch; h = SIDE.
Lengths are in units of 1/64 of a side, as in `tiny.world`.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import (
    ARRANGEMENTS,
    COLOR_RGB,
    COLORS,
    DIRECTIONS,
    GROUNDS,
    MARGIN,
    RADII,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    coverage,
    ground_sheets,
    pixel_grid,
    signed_distance,
)

# Colors are in [0, 1] here. Object colors are at least 0.32 away from every shade of every ground.
GROUND_REACH = 0.25  # the distance from a ground sheet at which a pixel's error is capped
GROUND_SHARE = 0.35  # at least this share of a picture must fit its ground sheet
COLOR_REACH = 0.3  # a thing whose color is further than this from the palette has no known color
SMALLEST = 25  # area; the smallest thing of the world (a small star of two) has 65
# Intersection over union below which a thing has no known shape. A diamond and the circle of its area have 0.83;
# renders, blurred as an autoencoder may blur, at least 0.85.
WORST_FIT = 0.84
CHUNK = 8  # pictures that fit the cache
UNIT = SIDE // 64  # pixels in a unit of length


def read(images: Tensor) -> list[Scene]:
    """What each picture shows, as a canonical complete scene (see `Scene`); (b, 3, h, w) in [-1, 1].

    Any picture is accepted: without things, `things=()`; of more than three, the largest three count; an attribute that
    cannot be determined is None. Pictures are read at SIDE × SIDE pixels, others are resized first.
    Raises ValueError for any other tensor shape.
    """
    images = resized(images) / 2 + 0.5
    return [scene for chunk in images.split(CHUNK) if len(chunk) for scene in read_chunk(chunk)]


def resized(images: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) as (b, 3, SIDE, SIDE) float32 on the CPU, in [-1, 1]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width)")
    images = images.detach().float().cpu().nan_to_num().clamp(-1, 1)
    if images.shape[-2:] != (SIDE, SIDE):
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return images


def read_chunk(images: Tensor) -> list[Scene]:
    """`read` for a batch (b, 3, h, h) of pictures in [0, 1]."""
    sheet, grounds, textures = find_ground(images)
    things = [[] for _ in images]
    for row, color, far, shape, overlap, fit in zip(*find_things(images, sheet), strict=True):
        name = COLORS[color] if far < COLOR_REACH else None
        things[row].append((name, SHAPES[shape] if overlap > WORST_FIT else None, *fit))
    return [arrange(*found) for found in zip(things, grounds, textures, strict=True)]


def find_things(images: Tensor, sheet: Tensor) -> tuple[list, ...]:
    """The things in pictures (b, 3, h, h), given their ground sheets, as six lists with one item per thing.

    These are: row in the batch, nearest color, its distance, best shape, its overlap, (center x, center y, radius).
    """
    components = find_components(opacity(images, sheet) > 0.5)  # (b, s, h, h) bool
    rows, slots = components.any(dim=(2, 3)).nonzero(as_tuple=True)
    if not len(rows):
        return [], [], [], [], [], []
    alpha, color = silhouettes(images[rows], sheet[rows], components[rows, slots], components[rows].any(dim=1))
    far, color = torch.cdist(color, COLOR_RGB).min(dim=1)
    return tuple(found.tolist() for found in (rows, color, far, *fit_shapes(alpha)))


def find_ground(images: Tensor) -> tuple[Tensor, list[str | None], list[str | None]]:
    """The best fitting ground sheet of each picture (b, 3, h, h), and its ground and texture.

    The squared error of a pixel counts up to GROUND_REACH, so pixels of things cost the same for every sheet.
    """
    cost, sheets = [], ground_sheets(images.shape[-1]).flatten(0, 1)
    for sheet in sheets:
        error = (images - sheet).square().sum(dim=1) / GROUND_REACH**2
        cost.append(error.clamp(max=1).mean(dim=(1, 2)))
    cost, best = torch.stack(cost).min(dim=0)
    known = (cost < 1 - GROUND_SHARE).tolist()
    grounds = [GROUNDS[i // len(TEXTURES)] if ok else None for i, ok in zip(best.tolist(), known, strict=True)]
    textures = [TEXTURES[i % len(TEXTURES)] if ok else None for i, ok in zip(best.tolist(), known, strict=True)]
    return sheets[best], grounds, textures


def opacity(images: Tensor, sheet: Tensor) -> Tensor:
    """The opacity of an object color over the ground sheet at each pixel, (b, h, h) in [0, 1].

    A pixel is ground + opacity * (color - ground) for some object color: the one that leaves the least error.
    """
    change = images - sheet
    best_error, best = torch.full_like(change[:, 0], torch.inf), torch.zeros_like(change[:, 0])
    for color in COLOR_RGB[:, :, None, None]:
        full = color - sheet
        length = full.square().sum(dim=1)
        share = ((change * full).sum(dim=1) / length).clamp(0, 1)
        error = (change - share[:, None] * full).square().sum(dim=1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, share, best)
    return best


def find_components(mask: Tensor) -> Tensor:
    """The three largest connected components (8 neighbors) of masks (b, h, h), as (b, 3, h, h) bool.

    Every pixel starts with its own label and takes the largest of its neighborhood until nothing changes.
    """
    inside = mask.float()
    labels = torch.arange(1.0, mask[0].numel() + 1).view_as(mask[0]) * inside
    while True:
        spread = labels
        for _ in range(8):
            spread = grow(spread) * inside
        if torch.equal(spread, labels):
            break
        labels = spread
    numbers = labels.flatten(1).long()
    areas = torch.zeros(len(mask), mask[0].numel() + 1, dtype=torch.long)
    areas.scatter_add_(1, numbers, torch.ones_like(numbers))
    areas[:, 0] = 0  # label 0 is the ground
    area, label = areas.topk(3, dim=1)
    label = label.masked_fill(area < SMALLEST * UNIT**2, -1)
    return labels[:, None] == label[:, :, None, None]


def grow(pictures: Tensor, times: int = 1) -> Tensor:
    """Each pixel of (b, h, h) becomes the maximum of its 3x3 neighborhood (many times faster than `max_pool2d`)."""
    last = pictures.shape[-1] - 1
    for axis in (1, 2) * times:
        before, after = pictures.narrow(axis, 0, last), pictures.narrow(axis, 1, last)
        pictures = pictures.clone()
        pictures.narrow(axis, 1, last).clamp_(min=before)
        pictures.narrow(axis, 0, last).clamp_(min=after)
    return pictures


def silhouettes(images: Tensor, sheet: Tensor, component: Tensor, any_component: Tensor) -> tuple[Tensor, Tensor]:
    """Soft silhouettes (t, h, h) and colors (t, 3) of things, in [0, 1], from their pictures and components.

    The color is the mean over the component's core; the silhouette is the opacity of that color over the ground,
    in the component and up to two units around it, outside other components.
    """
    solid = component.float()
    core = 1 - grow(1 - solid, UNIT)  # eroded by one unit
    core = torch.where(core.sum(dim=(1, 2), keepdim=True) >= 6 * UNIT**2, core, solid)
    color = (images * core[:, None]).sum(dim=(2, 3)) / core.sum(dim=(1, 2))[:, None]
    full = color[:, :, None, None] - sheet
    alpha = ((images - sheet) * full).sum(dim=1) / full.square().sum(dim=1).clamp(min=1e-4)
    around = grow(solid, 2 * UNIT).bool() & (component | ~any_component)
    return (2 * alpha - 0.5).clamp(0, 1) * around, color  # twice as steep: reduces blur and noise


@cache
def shape_moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centroid lies below its origin."""
    steps = torch.linspace(-1.1, 1.1, 1001)
    x, y = torch.meshgrid(steps, steps, indexing="xy")
    inside = signed_distance(shape, x, y) < 0
    return inside.sum().item() * (2.2 / 1000) ** 2, y[inside].mean().item()


def fit_shapes(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape (t,), overlap (t,), and center x, center y and radius (t, 3) of soft silhouettes (t, h, h).

    Each shape is drawn with the silhouette's area and centroid; the one of the largest intersection over union counts.
    """
    size = alpha.shape[-1]
    x, y = pixel_grid(size)
    pixels = alpha.sum(dim=(1, 2)).clamp(min=1e-4)
    center_x, center_y = (alpha * x).sum(dim=(1, 2)) / pixels, (alpha * y).sum(dim=(1, 2)) / pixels
    area = pixels / UNIT**2
    overlaps, fits = [], []
    for shape in SHAPES:
        unit_area, below = shape_moments(shape)
        radius = (area / unit_area).sqrt()
        fit = torch.stack([center_x, center_y - below * radius, radius])
        left, top, scale = fit[:, :, None, None]
        drawn = coverage(signed_distance(shape, (x - left) / scale, (y - top) / scale) * scale, size)
        overlaps.append(torch.minimum(drawn, alpha).sum(dim=(1, 2)) / torch.maximum(drawn, alpha).sum(dim=(1, 2)))
        fits.append(fit)
    overlap, best = torch.stack(overlaps).max(dim=0)
    return best, overlap, torch.stack(fits)[best, :, torch.arange(len(best))]


def arrange(found: list[tuple], ground: str | None, texture: str | None) -> Scene:
    """The canonical scene of up to three (color, shape, x, y, radius)."""
    arrangement = None
    if len(found) == 1:
        arrangement = position(*found[0][2:])
    elif found:
        arrangement, found = relation(found)
    things = []
    for color, shape, _, _, radius in found:
        misfit = [abs(math.log(radius / expected)) for expected in RADII[len(found)]]
        size = SIZES[misfit.index(min(misfit))] if len(found) < 3 else None
        things.append(Thing(shape, color, size))
    return Scene(tuple(things), arrangement, ground, texture)


def position(x: float, y: float, radius: float) -> str | None:
    """The position of a single thing; None if it is not near a named one."""
    reach = max(32 - MARGIN - radius, 6)
    away = {name: math.hypot((x - 32) / reach - dx, (y - 32) / reach - dy) for name, (dx, dy) in DIRECTIONS.items()}
    nearest = min(away, key=away.get)
    return nearest if away[nearest] < 0.5 else None


def relation(found: list[tuple]) -> tuple[str | None, list[tuple]]:
    """Arrangement of two or three (color, shape, x, y, radius), and these in canonical order (else left to right)."""
    across, down = sorted(found, key=lambda thing: thing[2]), sorted(found, key=lambda thing: thing[3])
    width, height = across[-1][2] - across[0][2], down[-1][3] - down[0][3]
    flat, upright, three = ARRANGEMENTS[len(found)][0], ARRANGEMENTS[len(found)][1], len(found) == 3
    if height < 0.5 * width:
        return flat, across
    if width < 0.5 * height:
        return upright, down
    top, *bottom = down
    left, right = sorted(bottom, key=lambda thing: thing[2]) if three else (top, top)
    if three and abs(left[3] - right[3]) < 0.4 * height and left[2] < top[2] < right[2]:
        return "triangle", [top, left, right]
    return None, across


# ---------------------------------------------------------------------------------------------------------------------
# measures


def adherence(prompted: Scene, found: Scene) -> float:
    """Share of the prompted attributes that `found` has, in [0, 1].

    The number of things is one attribute; each specified shape, color, size, arrangement, ground and texture is one.
    Prompted and found things are matched as well as possible; a specified arrangement counts as present only if it is
    the found one and the things match in its order ("left of" with both things swapped is wrong).
    """
    slots = [*found.things, *[None] * (len(prompted.things) - len(found.things))]
    best = 0
    for chosen in permutations(range(len(slots)), len(prompted.things)):
        hits = sum(
            said is not None and slots[i] is not None and said == getattr(slots[i], name)
            for thing, i in zip(prompted.things, chosen, strict=True)
            for name, said in vars(thing).items()
        )
        in_order = chosen == tuple(range(len(chosen)))
        hits += prompted.arrangement is not None and prompted.arrangement == found.arrangement and in_order
        best = max(best, hits)
    frame = [(prompted.ground, found.ground), (prompted.texture, found.texture)]
    best += (len(prompted.things) == len(found.things)) + sum(said is not None and said == is_ for said, is_ in frame)
    said = [prompted.arrangement, prompted.ground, prompted.texture]
    said += [value for thing in prompted.things for value in vars(thing).values()]
    return best / (1 + sum(value is not None for value in said))


def attribute_vectors(scenes: Sequence[Scene]) -> Tensor:
    """Unit-norm float64 rows (b, a) whose dot products are the share of attributes that two pictures share.

    Attributes: number of things, arrangement, ground, texture, and shape, color and size of each slot. Those that no
    picture of the group has are left out; of the others, two pictures without a thing in a slot share its attributes.
    The rows' cosine kernel gives the Vendi score of the group. Raises ValueError for no scenes.
    """
    if not scenes:
        raise ValueError("no scenes to compare; give at least one")
    tables = []
    for scene in scenes:
        table = {"count": len(scene.things), "arrangement": scene.arrangement}
        table |= {"ground": scene.ground, "texture": scene.texture}
        for slot, thing in enumerate(scene.things):
            table |= {f"{name} {slot}": value for name, value in vars(thing).items()}
        tables.append(table)
    names = sorted({name for table in tables for name, value in table.items() if value is not None})
    columns = sorted({(name, table.get(name, "no thing")) for table in tables for name in names}, key=str)
    hits = [[table.get(name, "no thing") == value for name, value in columns] for table in tables]
    return torch.tensor(hits, dtype=torch.float64) / math.sqrt(len(names))
