"""Sheets of pictures with a name before each row and a prompt over each group of columns."""

from PIL import Image, ImageDraw, ImageFont

from sampler import output

MARGIN, TOP = 260, 40  # pixels for the names and for the prompts


def sheet(rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """Each row holds equally many pictures of each prompt, one prompt after the other."""
    lines = {name: output.grid(pictures, columns=len(pictures)) for name, pictures in rows.items()}
    width, height = next(iter(lines.values())).size
    font = ImageFont.load_default(20)
    found = Image.new("RGB", (MARGIN + width, TOP + height * len(lines)), "white")
    draw = ImageDraw.Draw(found)
    for i, prompt in enumerate(prompts):
        place = MARGIN + output.GAP + i * width // len(prompts), 8
        draw.text(place, output.fit(f"“{prompt}”", font, width // len(prompts) - 2 * output.GAP), "black", font)
    for i, (name, line) in enumerate(lines.items()):
        found.paste(line, (MARGIN, TOP + i * height))
        draw.text((MARGIN - output.GAP, TOP + (i + 0.5) * height), name, "black", font, anchor="rm")
    return found


def stacked(sheets: list[Image.Image]) -> Image.Image:
    """Sheets of one width, one above the other."""
    found = Image.new("RGB", (sheets[0].width, sum(one.height for one in sheets)), "white")
    for i, one in enumerate(sheets):
        found.paste(one, (0, sum(above.height for above in sheets[:i])))
    return found
