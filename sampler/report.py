"""What is in a batch of pictures, in numbers: Vendi score, attributes, adherence to the prompt, quality."""

from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repulsion import vendi_score
from tiny.captions import parse
from tiny.drawing import WELL, wrong_pixels
from tiny.reader import adherence, attribute_vectors, read
from tiny.world import count_attributes


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures of one size → (b, 3, H, W) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def describe_batch(pictures: list[Image.Image], prompt: str, world: str | None) -> dict:
    """Vendi score of a batch, from 1 (all alike) to its size; in the tiny world also what each picture shows.

    In the tiny world the score is of the attributes that the pictures share; elsewhere of their pixels less the mean
    color, a coarse measure, in which all pictures of a single color are alike. `adherence`, 0 to 1, is the share of the
    prompted attributes that are present, or None for prompts outside the tiny world's grammar; `well_drawn` counts the
    pictures that are, but for half a percent of their pixels, what the world's renderer would draw.
    """
    pixels = to_pixels(pictures)
    if world != "tiny":
        vectors = (pixels - pixels.mean(dim=(2, 3), keepdim=True)).flatten(1)
        flat = (pixels.amax((2, 3)) == pixels.amin((2, 3))).all(dim=1, keepdim=True)
        vectors = torch.cat([vectors.masked_fill(flat, 0), flat], dim=1)  # without it they would have no direction
        return {"vendi": round(vendi_score(vectors).item(), 4), "vendi_of": "pixels"}
    scenes = read(pixels)
    try:
        asked = parse(prompt)
    except ValueError:  # a prompt outside the tiny world's grammar
        asked = None
    return {"vendi": round(vendi_score(attribute_vectors(scenes)).item(), 4), "vendi_of": "attributes",
            "attributes": count_attributes(scenes), "well_drawn": sum(count <= WELL for count in wrong_pixels(pixels)),
            "adherence": asked and round(mean(adherence(asked, scene) for scene in scenes), 4)}


def table(batches: dict[str, dict], images: int) -> str:
    """What `describe_batch` says of each batch, with its name and seconds, side by side as lines of text."""
    found = list(batches.values())
    rows = [("", *batches), (f"Vendi score (1 to {images})", *(f"{c['vendi']:.2f}" for c in found))]
    if found[0].get("adherence") is not None:
        rows.append(("adherence", *(f"{100 * c['adherence']:.0f} %" for c in found)))
    if "well_drawn" in found[0]:
        rows.append(("well drawn", *(f"{c['well_drawn']} of {images}" for c in found)))
    for name in dict.fromkeys(name for c in found for name in c.get("attributes", {})):
        counts = [c["attributes"].get(name, {}) for c in found]
        rows.append((name, *(", ".join(f"{number} {value}" for value, number in c.items()) for c in counts)))
    rows.append(("seconds", *(f"{c['seconds']:.2f}" for c in found)))
    widths = [max(map(len, cells)) + 2 for cells in zip(*rows, strict=True)]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)
