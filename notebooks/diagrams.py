"""Diagrams of the notebooks: the model, and a dual-stream block."""

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT, IMAGE, BOTH, PUSH = "#f3d9d3", "#d5e2ee", "#e6e6e6", "#c8553d"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, panel = plt.subplots(figsize=(width, height))
    panel.set(xlim=(0, 10 * width), ylim=(0, 10 * height), aspect="equal")
    panel.axis("off")
    return figure, panel


def box(panel: Axes, x: float, y: float, text: str, color: str, width: float = 17, height: float = 4.6, **how) -> None:
    """A box with its middle at x, y."""
    panel.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=color, edgecolor="0.5",
                                  linewidth=0.8, zorder=2))
    panel.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3, **how)


def arrow(panel: Axes, *points: tuple[float, float], color: str = "0.35") -> None:
    """A line through points, with a head at the last one."""
    for start, end in zip(points, points[1:-1], strict=False):
        panel.plot(*zip(start, end, strict=True), color=color, linewidth=1, zorder=1)
    panel.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1,
                                                           "shrinkA": 0, "shrinkB": 0}, zorder=1)


def model(blocks: int) -> Figure:
    """From prompt, noise level and latent to the velocity."""
    figure, panel = canvas(8.8, 3.4)
    for x, text, color in ((12, "prompt", TEXT), (44, "noise level σ", BOTH), (74, "noisy latent x", IMAGE)):
        box(panel, x, 3, text, color, 20)
    box(panel, 12, 10.5, "text encoders", TEXT, 20)
    box(panel, 44, 10.5, "sines, MLP", BOTH, 20)
    box(panel, 74, 10.5, "patches, linear,\n+ position", IMAGE, 20, 5.6)
    for x in (12, 44, 74):
        arrow(panel, (x, 5.3), (x, 7.7 if x == 74 else 8.2))
    arrow(panel, (22, 10.5), (34, 10.5))
    panel.text(28, 11.2, "pooled", ha="center", fontsize=8, color="0.3")
    box(panel, 43, 21, f"{blocks} dual-stream blocks", BOTH, 80, 6, fontweight="bold")
    for x, text in ((12, "context: text tokens"), (44, "conditioning vector"), (74, "image tokens")):
        arrow(panel, (x, 13.3 if x == 74 else 12.8), (x, 18))
        panel.text(x + 1, 15.3, text, va="center", fontsize=8, color="0.3")
    arrow(panel, (74, 24), (74, 28.4))
    box(panel, 74, 31, "modulate, linear", IMAGE, 20, 5)
    arrow(panel, (64, 31), (50, 31))
    panel.text(49, 31, "velocity v", ha="right", va="center", fontsize=9)
    return figure


def block() -> Figure:
    """A dual-stream block; time runs upwards."""
    figure, panel = canvas(7, 5.4)
    left, right, middle = 17, 53, 35
    for x, color, name in ((left, TEXT, "context  f$_T$"), (right, IMAGE, "image  f$_I$")):
        arrow(panel, (x, 1.5), (x, 4.7))
        panel.text(x, 1, name, ha="center", va="top", fontsize=9)
        box(panel, x, 7, "modulate", color)
        arrow(panel, (x, 9.3), (x, 11.7))
        box(panel, x, 14, "q, k, v  (own weights)", color, 22)
        arrow(panel, (x, 16.3), (x, 18.7))
    box(panel, middle, 21.4, "joint attention: one softmax over all n + m tokens", BOTH, 54, 5.4, fontweight="bold")
    for x, color, name in ((left, TEXT, "out projection"), (right, IMAGE, "out projection")):
        arrow(panel, (x, 24.1), (x, 26.2))
        box(panel, x, 28.5, name, color)
        arrow(panel, (x, 30.8), (x, 37.2))
        box(panel, x, 39.5, "gate, add", color)
        arrow(panel, (x, 41.8), (x, 43.7))
        box(panel, x, 46, "modulate, MLP, gate, add", color, 24)
        arrow(panel, (x, 48.3), (x, 52.5))
        side = x - 15 if x == left else x + 15
        arrow(panel, (x, 3), (side, 3), (side, 39.5), (x + (-8.5 if x == left else 8.5), 39.5))
    panel.text(left - 1, 34, r"$\hat f_T$", ha="right", va="center", fontsize=11)
    panel.text(right + 1, 34, r"$\hat f_I$", ha="left", va="center", fontsize=11)
    arrow(panel, (31, 34), (left + 1, 34), color=PUSH)
    panel.text(32, 34, "here repulsion pushes", va="center", fontsize=9, color=PUSH)
    return figure
