"""How the notebooks look: style, pictures in rows, heat maps with words, diagrams. Nothing here computes anything."""

from collections.abc import Sequence

from matplotlib import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

BLUE, RED, GREEN, YELLOW, GRAY = COLORS = ("#2f6690", "#c8553d", "#5b8e7d", "#e0a030", "#8a8a8a")

plt.rcParams.update({
    "figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": cycler(color=COLORS),
    "axes.grid": False, "legend.frameon": False, "image.interpolation": "nearest", "image.cmap": "viridis",
})  # fmt: skip


def pictures(rows: dict[str, Sequence], captions: Sequence = (), size: float = 1.25, **how) -> Figure:
    """Rows of pictures (PIL, enlarged smoothly, or (y, x) tensors), labels before rows, captions over columns."""
    columns = max(map(len, rows.values()))
    longest = max(len(line) for label in rows for line in label.split("\n"))
    figure, panels = plt.subplots(len(rows), columns, squeeze=False,
                                  figsize=(size * columns + 0.08 * longest, (size + 0.05) * len(rows) + 0.3))
    for line, (label, row) in zip(panels, rows.items(), strict=True):
        for panel in line:
            panel.axis("off")
        for panel, picture in zip(line, row, strict=False):
            smooth = "nearest" if isinstance(picture, Tensor) else "bicubic"
            panel.imshow(picture, **{"interpolation": smooth, **how})
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", color="0.3")
    for panel, caption in zip(panels[0], captions, strict=False):
        panel.set_title(caption, color="0.3")
    return figure


def heat(panel: Axes, values, x: Sequence[str] | None = None, y: Sequence[str] | None = None, title: str = "",
         **how) -> AxesImage:
    """A matrix (rows, columns) as a heat map, with a word at each row and column where words are given."""
    drawn = panel.imshow(values, aspect=how.pop("aspect", "auto"), **how)
    panel.set_title(title)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    if x is not None:
        panel.set_xticks(range(len(x)), x, rotation=90 if max(map(len, x)) > 3 else 0)
    if y is not None:
        panel.set_yticks(range(len(y)), y)
    return drawn
