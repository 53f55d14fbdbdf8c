"""Figures of the results: the verdict and the ablations, as PNG and SVG; and sheets of pictures."""

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..sheets import sheet
from .plan import REGIMES, but, by_strength
from .results import OURS, Result, Results, per_strength
from .run import pictures

STYLE = {"svg.hashsalt": "figures", "font.size": 15, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}
RED, BLUE, GREEN, GREY = "#c1121f", "#1f6fb4", "#2f8f4e", "#bbbbbb"
SHOWN = -2, 6  # points of lost adherence that a panel shows
DRAWN = "blocks", "place", "objective"  # of the ablations
GRID_PROMPTS = ["a circle", "a star above a ring"]


def closest(results: Results, model: str) -> list[str]:
    """The two methods that contextual repulsion is least ahead of."""
    found = results.beside(model)
    return sorted(found, key=lambda method: found[method][1][0])[:2]


def verdict_figure(results: Results, models: list[str]) -> Figure:
    """Gain against lost adherence on the prompts to report, a panel a checkpoint: the settings that were chosen, and
    contextual repulsion at rising strengths with the line that other methods are compared with (`Results.ahead`)."""
    figure = Figure(figsize=(5.6 * len(models), 6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for model, panel in zip(models, panels, strict=True):
        colors = {OURS: RED, **dict(zip(closest(results, model), (BLUE, GREEN), strict=False))}  # all others are grey
        own = [r for r in (results.result(model, setting) for setting in by_strength(model)) if r]
        for method, found in results.verdict(model).items():
            shown = {str(r.setting): r for r in (own if method == OURS else found.values()) if r}
            draw_method(panel, list(shown.values()), colors.get(method), fitted(own) if method == OURS else None)
        panel.plot(0, 1, "o", color="black", markersize=9, zorder=5)
        panel.set(title=f"{model}: {REGIMES[model]}", xlabel="lost adherence, points", xlim=SHOWN)
        lines = [panel.plot([], [], "o-", color=color, lw=3, label=method)[0] for method, color in colors.items()]
        lines += [panel.plot([], [], "o-", color=GREY, label="others")[0]]
        lines += panel.plot([], [], "o", color="black", markersize=9, label="base")
        panel.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, handlelength=1.2)
    panels[0].set_ylabel("Vendi score × base")
    return figure


def fitted(own: list[Result]) -> list[tuple[float, float]]:
    """Lost adherence and gain of contextual repulsion, from the base on, with a loss proportional to its strength."""
    strengths = torch.tensor([r.setting["repulsion"]["strength"] for r in own])
    rate = per_strength(strengths, torch.tensor([-r.adherence[0] for r in own]))
    return [(0.0, 1.0), *[(rate.item() * s, r.gain[0]) for s, r in zip(strengths.tolist(), own, strict=True)]]


def draw_method(panel: Axes, found: list[Result], color: str | None, line: list[tuple[float, float]] | None) -> None:
    """A method's settings and a line, by default from the base through these by rising loss; intervals where it has a
    color."""
    found = sorted((r for r in found if -r.adherence[0] <= SHOWN[1]), key=lambda r: -r.adherence[0])
    points = [(-r.adherence[0], r.gain[0]) for r in found]
    panel.plot(*zip(*(line or [(0.0, 1.0), *points]), strict=True), "-", color=color or GREY, lw=3 if color else 1.2,
               zorder=3 if color else 1)
    panel.plot(*zip(*points, strict=True) if found else ([], []), "o", color=color or GREY,
               markersize=9 if color else 5, zorder=4 if color else 2)
    for r in found if color else ():
        (x, high, low), (y, bottom, top) = (-value for value in r.adherence), r.gain
        panel.errorbar(x, y, [[y - bottom], [top - y]], [[x - low], [high - x]], color=color, alpha=0.45, lw=1.5)


def ablations_figure(results: Results, models: list[str], names: list[str]) -> Figure:
    """One row of panels a checkpoint, one panel an ablation: gain as bars, change of adherence written on them."""
    figure = Figure(figsize=(5.6 * len(names), 4.2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(names), squeeze=False, sharey=True)
    for model, line in zip(models, panels, strict=True):
        for name, panel in zip(names, line, strict=True):
            found = results.ablation(model, name)
            for i, r in enumerate(found.values()):
                value, low, high = r.gain
                panel.bar(i, value - 1, bottom=1, color=RED, alpha=0.8)
                panel.errorbar(i, value, [[value - low], [high - value]], color="black", lw=1.5)
                panel.annotate(f"{r.adherence[0]:+.1f}", (i, high), xytext=(0, 3), textcoords="offset points",
                               ha="center", fontsize=14)
            panel.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
            panel.set_title(f"{model}: {name}")
            panel.margins(y=0.15)
        line[0].set_ylabel("Vendi score × base")
    figure.suptitle("Contextual repulsion as shipped but for one thing; above each bar the change of adherence, points")
    return figure


def grid_figure(results: Results, model: str, folder: Path) -> None:
    """What the base, contextual repulsion as shipped and its closest rivals paint from the same seeds."""
    found = results.beside(model)
    ways = {"base": {}, OURS: but(model), **{method: found[method][0].setting for method in closest(results, model)}}
    rows = {name: [picture for prompt in GRID_PROMPTS for picture in pictures(model, setting, prompt, seed=0)]
            for name, setting in ways.items()}
    sheet(rows, GRID_PROMPTS).save(folder / f"grid-{model}.png")


@rc_context(STYLE)
def all_figures(results: Results, models: list[str], folder: Path) -> None:
    """Every figure that the results are enough for."""
    folder.mkdir(parents=True, exist_ok=True)
    judged = [model for model in models if results.verdict(model)]
    ablated = [name for name in DRAWN if any(results.ablation(model, name) for model in models)]
    figures = {**({"verdict": verdict_figure(results, judged)} if judged else {}),
               **({"ablations": ablations_figure(results, models, ablated)} if ablated else {})}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    for model in judged:
        grid_figure(results, model, folder)
