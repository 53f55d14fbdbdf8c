"""What is measured of a batch of pictures, as one row of raw results, and what is read from many rows."""

import base64
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean as mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repulsion import vendi_score
from sampler.report import to_pixels
from tiny.captions import parse
from tiny.drawing import wrong_pixels
from tiny.reader import adherence, attribute_vectors, read
from tiny.world import (
    ARRANGEMENTS,
    COLORS,
    GROUNDS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
)

from .embedding import WIDTH, Embedding

Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval


def measure(pictures: list[Image.Image], prompt: str, embedding: Embedding) -> dict[str, object]:
    """The numbers of one group, small enough to be kept: everything else is computed from them.

    vendi: of the attributes, 1 to the number of pictures; vendi_embedding: likewise, of `Embedding`
    adherence: share of the prompted attributes that are present, 0 to 1
    unreadable: share of a picture's attributes that the reader cannot tell, 0 to 1
    wrong_pixels: of 10,000, how many differ clearly from the closest picture that the world's renderer can draw
    scenes, embedding: what each picture shows, and where it lies
    """
    pixels = to_pixels(pictures)
    scenes, vectors = read(pixels), embedding(pixels)
    asked = parse(prompt)
    numbers = {
        "vendi": vendi_score(attribute_vectors(scenes)).item(),
        "vendi_embedding": vendi_score(vectors).item(),
        "adherence": mean([adherence(asked, scene) for scene in scenes]),
        "unreadable": mean([unreadable(scene) for scene in scenes]),
        "wrong_pixels": mean(wrong_pixels(pixels)),
    }
    return {
        **{name: round(number, 6) for name, number in numbers.items()},
        "scenes": [to_text(scene) for scene in scenes],
        "embedding": base64.b64encode(vectors.half().numpy().tobytes()).decode(),
    }  # fmt: skip


def unreadable(scene: Scene) -> float:
    """Share of a picture's attributes that the reader could not tell: torn pictures must not pass for diverse."""
    values = [scene.arrangement, scene.ground, scene.texture]
    for thing in scene.things:
        values += [thing.shape, thing.color] + ([thing.size] if len(scene.things) < 3 else [])
    return values.count(None) / len(values)


def to_text(scene: Scene) -> str:
    """A scene as one short word list, "?" for what cannot be told: "center navy plain, circle red large"."""
    frame = [scene.arrangement, scene.ground, scene.texture]
    things = [[thing.shape, thing.color, thing.size] for thing in scene.things]
    return ", ".join(" ".join((value or "?").replace(" ", "-") for value in values) for values in (frame, *things))


def to_scene(text: str) -> Scene:
    """The scene that `to_text` wrote."""
    frame, *things = ([None if word == "?" else word.replace("-", " ") for word in part.split(" ")]
                      for part in text.split(", "))
    return Scene(tuple(Thing(*thing) for thing in things), *frame)


def vectors_of(row: dict) -> Tensor:
    """The embedding in a row: (images, WIDTH) float64."""
    numbers = np.frombuffer(base64.b64decode(row["embedding"]), dtype=np.float16)
    return torch.from_numpy(numbers.reshape(-1, WIDTH).astype(np.float64))


def vendi_of_pairs(scenes: Sequence[Scene]) -> float:
    """Mean Vendi score of the attributes over all pairs, 1 to 2: it can be compared between batches of any size.

    Two pictures that share so much of their attributes have the eigenvalues (1 ± shared) / 2.
    """
    shared = torch.stack([torch.dot(*attribute_vectors(pair)) for pair in combinations(scenes, 2)])
    low, high = (1 - shared) / 2, (1 + shared) / 2
    return (torch.special.entr(low) + torch.special.entr(high)).exp().mean().item()


def values_reached(prompt: str, scenes: Sequence[Scene]) -> float:
    """Share of the values that the prompt leaves open that occur at all among these pictures, 0 to 1.

    Counted for each attribute that the prompt leaves open for some thing, then averaged.
    """
    asked, shares = parse(prompt), []
    for name, values in (("shape", SHAPES), ("color", COLORS), ("size", SIZES)):
        if len(asked.things) == 3 and name == "size":  # three things are all of one size
            continue
        if any(getattr(thing, name) is None for thing in asked.things):
            found = {getattr(thing, name) for scene in scenes for thing in scene.things}
            shares.append(len(found & set(values)) / len(values))
    for name, values in (("arrangement", ARRANGEMENTS[len(asked.things)]), ("ground", GROUNDS), ("texture", TEXTURES)):
        if getattr(asked, name) is None:
            found = {getattr(scene, name) for scene in scenes}
            shares.append(len(found & set(values)) / len(values))
    return mean(shares) if shares else 1.0


def kernel_distance(found: Tensor, wanted: Tensor) -> float:
    """KID (Bińkowski et al., arXiv:1801.01401): unbiased squared MMD with the kernel (x · y / d + 1)³.

    found (m, d), wanted (n, d), m and n at least 2. About 0 for two samples of one distribution; it can be negative.
    """
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3
    m, n = len(found), len(wanted)
    own, other = kernel(found, found), kernel(wanted, wanted)
    inside = (own.sum() - own.trace()) / (m * (m - 1)) + (other.sum() - other.trace()) / (n * (n - 1))
    return (inside - 2 * kernel(found, wanted).mean()).item()


def interval(by_prompt: Sequence[Tensor], statistic: Callable[[Tensor], Tensor]) -> Interval:
    """A statistic of the mean over prompts, with its 95 % interval over the noises: the prompts count as given.

    Stratified jackknife: each group is left out once, and Σ_p (n_p − 1) / n_p Σ_i (θ_pi − mean θ_p)² is the variance;
    for a mean it is Σ_p s_p² / n_p over the squared number of prompts. Where a prompt has one group only, the groups'
    spread is unknown, and the interval is over the prompts: these are left out instead. NaN for a single prompt.
    by_prompt: for each prompt its groups (n, k); statistic: (…, k) → (…).
    """
    if any(len(groups) == 1 for groups in by_prompt):
        by_prompt = over_prompts(by_prompt)
    means = torch.stack([groups.mean(0) for groups in by_prompt])
    variance = torch.zeros((), dtype=means.dtype)
    for groups, own in zip(by_prompt, means, strict=True):
        n = len(groups)
        without = (n * own - groups) / (n - 1)
        left_out = statistic(means.mean(0) + (without - own) / len(means))
        variance += (n - 1) / n * (left_out - left_out.mean()).square().sum()
    value, half = statistic(means.mean(0)).item(), 1.96 * variance.sqrt().item()
    return value, value - half, value + half


def over_prompts(by_prompt: Sequence[Tensor]) -> list[Tensor]:
    """What `interval` takes for an interval over the prompts: their means, as the groups of one."""
    return [torch.stack([groups.mean(0) for groups in by_prompt])]
