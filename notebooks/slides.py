"""The lecture's slides, from the stored figures of the notebooks: `python notebooks/slides.py outputs/slides`.

The last table of docs/lecture.md has a row a slide: title, figure ("5 · While the push acts": the first one below that
heading of notebook 5), text.
"""

import base64
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent
LECTURE = NOTEBOOKS.parent / "docs" / "lecture.md"


def rows() -> list[tuple[str, str, str]]:
    """Title, figure and text of each slide."""
    table = LECTURE.read_text(encoding="utf-8").split("\n## Slides\n")[1]
    return [tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in table.splitlines()
            if line.startswith("| ")][1:]


def figure(place: str) -> bytes:
    """The first picture below a heading of a notebook, as a PNG. Raises ValueError where there is none."""
    number, heading = place.split(" · ", 1)
    (file,) = NOTEBOOKS.glob(f"{number}-*.ipynb")
    below = False
    for cell in nbformat.read(file, as_version=4).cells:
        below |= cell.cell_type == "markdown" and f"## {heading}" in cell.source.splitlines()
        for output in cell.get("outputs", ()):
            if below and "image/png" in output.get("data", ()):
                return base64.b64decode(output.data["image/png"])
    raise ValueError(f"{file.name} has no stored figure below the heading {heading!r}: run it and save its outputs")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    slides = []
    for i, (title, place, text) in enumerate(rows(), start=1):
        (folder / f"{i:02}.png").write_bytes(figure(place))
        slides.append(f"# {title}\n\n![{place}]({i:02}.png)\n\n{text}\n")
    (folder / "slides.md").write_text("---\nmarp: true\n---\n\n" + "\n---\n\n".join(slides), encoding="utf-8")
    print(f"{len(slides)} slides in {folder / 'slides.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
