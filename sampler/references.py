"""Reference pictures of FLUX.1-Kontext and FLUX.2: resized to sizes that the model was trained on, then to tensors."""

from collections.abc import Sequence

from PIL import Image, ImageOps
from torch import Tensor

from .report import to_pixels

TRAINED_AREA = 1024**2
NARROW = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
SIZES = (*NARROW, (1024, 1024), *((h, w) for w, h in NARROW))  # what Kontext was trained on
SINGLE_AREA = 2024**2  # of FLUX.2's reference picture where there is one; where there are several, TRAINED_AREA each


def kontext_size(width: int, height: int, area: int = TRAINED_AREA, multiple: int = 16) -> tuple[int, int]:
    """The width and height that Kontext's reference is resized to: the trained size nearest in width / height.

    For a model whose own pictures have another `area` (pixels) the trained sizes are scaled to it. Sides are cut to a
    `multiple`, never below one. Source: Black Forest Labs' flux, `prepare_kontext`.
    """
    _, *sides = min((abs(width / height - w / h), w, h) for w, h in SIZES)
    scale = (area / TRAINED_AREA) ** 0.5
    return tuple(max(1, int(scale * side) // multiple) * multiple for side in sides)


def flux2_size(width: int, height: int, area: int) -> tuple[int, int]:
    """The width and height that a reference for FLUX.2 is scaled down to, at most `area` pixels; none is enlarged.

    Raises ValueError for a side below 64 pixels and for sides beyond 8 : 1. Source: Black Forest Labs' flux2.
    """
    if min(width, height) < 64 or max(width, height) > 8 * min(width, height):
        raise ValueError(f"image has {width} × {height} pixels, but FLUX.2 takes sides of at least 64 pixels, at most "
                         "8 : 1: enlarge or crop it")
    scale = min(1.0, (area / (width * height)) ** 0.5)
    return int(width * scale), int(height * scale)


def read_references(pictures: Sequence[Image.Image], flux2: bool, area: int,
                    multiple: int = 16) -> tuple[list[Tensor], tuple[int, int]]:
    """Pictures of any mode and size → each (1, 3, H, W) float32 in [-1, 1]; and a height and width to generate in.

    Kontext has one, of `kontext_size`, and generates in that size. FLUX.2's are scaled down by `flux2_size`, and their
    center is cropped to multiples of `multiple`; the size is that of the first, scaled down to `area` pixels.
    All are rotated by their EXIF entries and resized with a Lanczos filter; transparent areas become white.
    """
    pictures = [to_rgb(picture) for picture in pictures]
    if flux2:
        limit = SINGLE_AREA if len(pictures) == 1 else TRAINED_AREA
        resized = [picture.resize(flux2_size(*picture.size, limit), Image.Resampling.LANCZOS) for picture in pictures]
        resized = [crop_center(picture, *(side // multiple * multiple for side in picture.size)) for picture in resized]
        width, height = (side // multiple * multiple for side in flux2_size(*pictures[0].size, area))
    else:
        width, height = kontext_size(*pictures[0].size, area, multiple)
        resized = [pictures[0].resize((width, height), Image.Resampling.LANCZOS)]
    return [to_pixels([picture]) for picture in resized], (height, width)


def crop_center(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as it is shown: rotated by its EXIF entry, 16 bits scaled to 8, on white where transparent.

    Raises ValueError for 32 bits a pixel, whose range of values is unknown.
    """
    if picture.mode in ("F", "I"):
        raise ValueError(f"image has mode {picture.mode}, 32 bits a pixel, whose range of values is unknown: scale it "
                         "to 0 … 255 and convert it to RGB")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
