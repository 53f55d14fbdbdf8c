"""Files: single pictures, grids, the labeled comparison, the numbers."""

import json
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

GAP = 8  # pixels between the pictures of a grid


def enlarge(picture: Image.Image, least: int = 128) -> Image.Image:
    """Small pictures become visible, smoothly: sides multiplied by a whole number until they reach `least` pixels."""
    factor = max(1, -(-least // min(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def grid(pictures: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size side by side, in rows of `columns` (default: 4, or all in one row) on white."""
    pictures = [enlarge(p) for p in pictures]
    columns = columns or min(len(pictures), 4)
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)))
    return sheet


def side_by_side(sheets: list[tuple[str, Image.Image]], title: str) -> Image.Image:
    """Labeled grids next to each other under a title."""
    size = max(15, sheets[0][1].height // 18)
    large = ImageFont.load_default(round(1.25 * size))
    top, label, gap = round(2.2 * size), round(1.8 * size), 2 * GAP
    width = sum(sheet.width for _, sheet in sheets) + gap * (len(sheets) - 1)
    picture = Image.new("RGB", (width, top + label + sheets[0][1].height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), fit(f"“{title}”", large, width - 2 * GAP), fill="black", font=large)
    x = 0
    for name, sheet in sheets:
        room = sheet.width - 2 * GAP
        fonts = [ImageFont.load_default(smaller) for smaller in range(size, 8, -1)]  # the score is at the name's end
        font = next((font for font in fonts if font.getlength(name) <= room), fonts[-1])
        draw.text((x + GAP, top + GAP // 2), fit(name, font, room), fill=(90, 90, 90), font=font)
        picture.paste(sheet, (x, top + label))
        x += sheet.width + gap
    return picture


def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    ends = (text, *(text[:i] + "…" for i in range(len(text) - 1, 0, -1)))
    return next((end for end in ends if font.getlength(end) <= width), "…")


def save_png(picture: Image.Image, file: Path, about: dict[str, object]) -> None:
    """A PNG that carries `about` as text entries (prompt, seed, settings)."""
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    picture.save(file, pnginfo=info)


def folder_name(prompt: str) -> str:
    """What a folder for pictures of this prompt is called: its letters a to z and digits, at most 60 signs."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "prompt"


def write_summary(folder: Path, content: dict[str, object]) -> None:
    """summary.json, with line breaks for a person to read."""
    (folder / "summary.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

