"""What is in a batch of pictures, in numbers: Vendi score, attributes, adherence to the prompt."""

from collections import Counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repulsion import vendi_score
from tiny.captions import parse
from tiny.reader import adherence, attribute_vectors, read
from tiny.world import Scene


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size → (b, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def describe_batch(pictures: list[Image.Image], prompt: str, world: str | None) -> dict:
    """Vendi score of a batch, from 1 (all alike) to its size; in the tiny world also what each picture shows.

    In the tiny world the score is of the attributes that the pictures share; elsewhere of their pixels less the mean
    color, a coarse measure. `adherence`, 0 to 1, is the share of the prompted attributes that are present, or None
    where the prompt is not of the tiny world's language.
    """
    pixels = to_pixels(pictures)
    if world != "tiny":
        vectors = pixels.flatten(2) - pixels.mean(dim=(2, 3))[:, :, None]
        return {"vendi": round(vendi_score(vectors.flatten(1)).item(), 4), "vendi_of": "pixels"}
    scenes = read(pixels)
    return {
        "vendi": round(vendi_score(attribute_vectors(scenes)).item(), 4),
        "vendi_of": "attributes",
        "adherence": scene_adherence(prompt, scenes),
        "attributes": count_attributes(scenes),
    }


def scene_adherence(prompt: str, scenes: list[Scene]) -> float | None:
    """Mean share of the prompt's attributes found in the scenes; None where the prompt cannot be parsed."""
    try:
        asked = parse(prompt)
    except ValueError:
        return None
    return round(sum(adherence(asked, scene) for scene in scenes) / len(scenes), 4)


def count_attributes(scenes: list[Scene]) -> dict[str, dict[str, int]]:
    """How often each value of each attribute occurs in the batch, the most frequent first."""
    found: dict[str, Counter] = {}
    for scene in scenes:
        values = [("arrangement", scene.arrangement), ("ground", scene.ground), ("texture", scene.texture)]
        for thing in scene.things:
            values += [("shape", thing.shape), ("color", thing.color), ("size", thing.size)]
        for name, value in values:
            if value is not None:
                found.setdefault(name, Counter())[value] += 1
    order = ("shape", "color", "size", "arrangement", "ground", "texture")
    return {name: dict(found[name].most_common()) for name in order if name in found}


def table(base: dict | None, repelled: dict | None, images: int) -> str:
    """The two batches side by side as lines of text; either may be missing."""
    columns = [(name, column) for name, column in (("typical", base), ("repelled", repelled)) if column is not None]
    rows = [("", [name for name, _ in columns]),
            (f"Vendi score (1 to {images})", [f"{c['vendi']:.2f}" for _, c in columns])]
    if columns[0][1].get("adherence") is not None:
        rows.append(("adherence", [f"{100 * c['adherence']:.0f} %" for _, c in columns]))
    names = dict.fromkeys(name for _, c in columns for name in c.get("attributes", {}))
    for name in names:
        counts = [c["attributes"].get(name, {}) for _, c in columns]
        rows.append((name, [", ".join(f"{number} {value}" for value, number in count.items()) for count in counts]))
    rows.append(("seconds", [f"{c['seconds']:.2f}" for _, c in columns]))
    widths = [max(len(row[1][i]) for row in rows) for i in range(len(columns))]
    first = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(first + 2) + "  ".join(cell.ljust(w) for cell, w in zip(row[1], widths, strict=True))
             for row in rows]
    return "\n".join(line.rstrip() for line in lines)


