"""FLUX.1-Kontext's reference picture: resized to a size that the model was trained on, then to a tensor."""

from PIL import Image, ImageOps
from torch import Tensor

from .report import to_pixels

TRAINED_AREA = 1024**2
NARROW = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
SIZES = (*NARROW, (1024, 1024), *((h, w) for w, h in NARROW))  # what Kontext was trained on


def reference_size(width: int, height: int, area: int = TRAINED_AREA, multiple: int = 16) -> tuple[int, int]:
    """The width and height that a reference picture is resized to: the trained size nearest in width / height.

    For a model whose own pictures have another `area` (pixels) the trained sizes are scaled to it. Sides are cut to a
    `multiple`, never below one. Source: Black Forest Labs' flux, `prepare_kontext`.
    """
    _, *sides = min((abs(width / height - w / h), w, h) for w, h in SIZES)
    scale = (area / TRAINED_AREA) ** 0.5
    return tuple(max(1, int(scale * side) // multiple) * multiple for side in sides)


def reference_pixels(picture: Image.Image, area: int = TRAINED_AREA, multiple: int = 16) -> Tensor:
    """A picture of any mode and size → (1, 3, H, W) float32 in [-1, 1], its sides by `reference_size`.

    It is rotated by its EXIF entry and resized with a Lanczos filter; transparent areas become white.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    size = reference_size(*picture.size, area, multiple)
    return to_pixels([picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)])
