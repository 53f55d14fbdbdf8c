"""Figures of the results: fronts and ablations, as PNG and SVG; and every method's pictures on the same seeds."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from ..sheets import sheet
from .plan import KNOBS, REGIMES, ablations
from .run import pictures
from .tables import AS_SHIPPED, Result, Results, best, front

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "figures", "font.size": 11, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False})
COLORS = {  # one for each method, the same in every figure
    AS_SHIPPED: "#000000", "contextual repulsion": "#c1121f", "away from the mean": "#e5989b",
    "image-token repulsion": "#f4a261", "CADS": "#2a9d8f", "particle guidance": "#457b9d", "SPARKE": "#1d3557",
    "DiverseFlow": "#8d99ae", "group selection": "#7b2cbf", "lower guidance": "#6a994e",
    "interval guidance": "#a7c957", "Feature Self-Guidance": "#b5651d", "DAVE": "#bc6c25", "STRIDE": "#e9c46a",
    "coupled noise": "#48cae4", "pink noise": "#ff8fab", "seed variance": "#52796f", "CNO": "#6d597a",
    "first step from the teacher": "#adb5bd",
}  # fmt: skip
PRICES = {"adherence": "lost adherence, points of 100", "wrong_pixels": "more wrong pixels in a picture"}
SHOWN = {"adherence": 12, "wrong_pixels": 250}  # the price at which a panel ends
GRID_PROMPTS = ["a circle", "a star above a ring"]


def save(figure: pyplot.Figure, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.png", dpi=110)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def price_of(result: Result, price: str) -> tuple[float, float, float]:
    """The price and its interval, more being worse."""
    value, low, high = getattr(result, price)
    return (-value, -high, -low) if price == "adherence" else (value, low, high)


def fronts_figure(results: Results, models: list[str], price: str, folder: Path) -> None:
    """Gain against a price, a panel a checkpoint: all settings as faint dots, the front of each method as a line."""
    figure, panels = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4.8), layout="constrained",
                                     squeeze=False)
    for model, panel in zip(models, panels[0], strict=True):
        for method, found in results.fronts(model).items():
            draw_front(panel, method, found, price)
        panel.plot(0, 1, "k+", markersize=12)
        panel.annotate("base", (0, 1), xytext=(6, -12), textcoords="offset points")
        panel.set(title=f"{model}: {REGIMES[model]}", xlabel=PRICES[price], xlim=(-SHOWN[price] / 6, SHOWN[price]))
    panels[0][0].set_ylabel("Vendi score of the attributes × base")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    save(figure, folder, f"fronts-{price.replace('_', '-')}")


def draw_front(panel: Axes, method: str, found: list[Result], price: str) -> None:
    color, bold = COLORS[method], method == "contextual repulsion"
    def shown(results: list[Result]) -> list[tuple]:
        return [(price_of(r, price), r.gain) for r in results if price_of(r, price)[0] <= SHOWN[price]]
    panel.scatter([x[0] for x, _ in shown(found)], [y[0] for _, y in shown(found)], s=14, color=color, alpha=0.35)
    points = shown(front(found, price))
    panel.plot([x[0] for x, _ in points], [y[0] for _, y in points], "o-", color=color, label=method,
               linewidth=2.6 if bold else 1.3, markersize=6 if bold else 4, zorder=3 if bold else 2)
    for (x, x_low, x_high), (y, y_low, y_high) in points:
        panel.errorbar(x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]], color=color, alpha=0.3, lw=0.8)


def ablations_figure(results: Results, models: list[str], folder: Path) -> None:
    """One row of panels a checkpoint, one panel an ablation: gain as bars, change of adherence written on them."""
    names = [name for name in ablations(models[0]) if name not in KNOBS and results.ablation(models[0], name)]
    if not names:
        return
    figure, panels = pyplot.subplots(len(models), len(names), figsize=(4.2 * len(names), 3.4 * len(models)),
                                     layout="constrained", squeeze=False, sharey=True)
    for model, line in zip(models, panels, strict=True):
        for name, panel in zip(names, line, strict=True):
            found = results.ablation(model, name)
            for i, r in enumerate(found.values()):
                value, low, high = r.gain
                panel.bar(i, value - 1, bottom=1, color=COLORS["contextual repulsion"], alpha=0.8)
                panel.errorbar(i, value, [[value - low], [high - value]], color="black", lw=1)
                panel.annotate(f"{r.adherence[0]:+.1f}", (i, high), xytext=(0, 3), textcoords="offset points",
                               ha="center", fontsize=9)
            panel.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
            panel.set_title(f"{model}: {name}")
            panel.margins(y=0.15)
        line[0].set_ylabel("Vendi × base")
    figure.suptitle("Contextual repulsion as shipped but for one thing; above each bar the change of adherence, points")
    save(figure, folder, "ablations")


def grid_figure(results: Results, model: str, folder: Path) -> None:
    """What every method paints from the same seeds, at the setting of the table."""
    ways = {"base": {}, **{method: best(found).setting for method, found in results.fronts(model).items()}}
    rows = {name: [picture for prompt in GRID_PROMPTS for picture in pictures(model, setting, prompt, seed=0)]
            for name, setting in ways.items()}
    sheet(rows, GRID_PROMPTS).save(folder / f"grid-{model}.png")


def all_figures(results: Results, models: list[str], folder: Path) -> None:
    """Every figure that the results are enough for."""
    folder.mkdir(parents=True, exist_ok=True)
    for price in PRICES:
        fronts_figure(results, models, price, folder)
    ablations_figure(results, models, folder)
    for model in models:
        grid_figure(results, model, folder)
