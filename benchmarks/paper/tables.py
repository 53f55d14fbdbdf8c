"""From rows of raw results to tables: nothing here paints a picture."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tiny.captions import parse
from tiny.reader import adherence
from tiny.world import render, sample_scene

from .embedding import Embedding
from .measures import bootstrap, kernel_distance, mean, to_scene, values_reached, vectors_of, vendi_of_pairs
from .plan import BATCHES, FULL, GROUP, KNOBS, REGIMES, SHIPPED, ablations, fronts, told_everything

KEPT = 3.0  # points of adherence that a method may lose where one figure is to stand for its whole front
AS_SHIPPED = "contextual, as shipped"
RENDERS = 64  # for each prompt, what KID compares with
Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval


@dataclass(frozen=True)
class Result:
    """A setting in numbers, against the base on the same prompts and seeds.

    gain, gain_embedding: Vendi score over the base's; adherence: its change, in points of 100; wrong_pixels: its
    change; coverage: share of the open values; kid: distance to renders of what the prompts ask; groups: how many it
    was measured on
    """

    setting: dict
    gain: Interval
    gain_embedding: Interval
    adherence: Interval
    wrong_pixels: Interval
    coverage: float
    kid: float
    groups: int


class Results:
    """All rows, found by what was asked for; those of full prompts apart from those of open ones."""

    def __init__(self, rows: Iterable[dict]):
        self.rows: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
        for row in rows:
            which = row["model"], json.dumps(row["setting"]), row["images"], row["prompt"] in FULL
            self.rows[which][row["prompt"], row["seed"]] = row

    def groups(self, model: str, setting: dict, images: int = GROUP, full: bool = False) -> dict[tuple, dict]:
        """(prompt, seed) → row."""
        return self.rows.get((model, json.dumps(setting), images, full), {})

    def result(self, model: str, setting: dict, only: set[tuple] | None = None) -> Result | None:
        """None where nothing was painted with this setting, or no base to compare with; `only`: these groups."""
        mine, base = self.groups(model, setting), self.groups(model, {})
        both = [key for key in mine if key in base and (only is None or key in only)]
        if not both:
            return None
        names = "vendi", "vendi_embedding", "adherence", "wrong_pixels"
        pairs = defaultdict(list)
        for key in both:
            pairs[key[0]].append([[row[name] for name in names] for row in (mine[key], base[key])])
        by_prompt = [torch.tensor(groups, dtype=torch.float64).flatten(1) for groups in pairs.values()]  # (n, 8)
        shown = {prompt: [to_scene(text) for key in both if key[0] == prompt for text in mine[key]["scenes"]]
                 for prompt in pairs}
        return Result(
            setting,
            bootstrap(by_prompt, lambda m: m[..., 0] / m[..., 4]),
            bootstrap(by_prompt, lambda m: m[..., 1] / m[..., 5]),
            bootstrap(by_prompt, lambda m: 100 * (m[..., 2] - m[..., 6])),
            bootstrap(by_prompt, lambda m: m[..., 3] - m[..., 7]),
            mean([values_reached(prompt, scenes) for prompt, scenes in shown.items()]),
            kernel_distance(torch.cat([vectors_of(mine[key]) for key in both]), renders(tuple(sorted(pairs)))),
            len(both),
        )  # fmt: skip

    def compared(self, model: str, settings: dict[str, dict]) -> dict[str, Result]:
        """Name → what a setting came to, all on the groups that every painted setting has."""
        painted = {name: setting for name, setting in settings.items() if self.groups(model, setting)}
        common = set.intersection(*[set(self.groups(model, setting)) for setting in painted.values()] or [set()])
        found = {name: self.result(model, setting, common) for name, setting in painted.items()}
        return {name: result for name, result in found.items() if result}

    def fronts(self, model: str) -> dict[str, list[Result]]:
        """Method → what each of its settings came to."""
        methods = {AS_SHIPPED: [SHIPPED[1]], **fronts(model)}
        named = {(method, json.dumps(setting)): setting for method in methods for setting in methods[method]}
        found = defaultdict(list)
        for (method, _), result in self.compared(model, named).items():
            found[method].append(result)
        return dict(found)

    def ablation(self, model: str, name: str) -> dict[str, Result]:
        """Row → what it came to; empty where nothing was painted but the row that is as shipped."""
        found = self.compared(model, ablations(model).get(name, {}))
        return found if len(found) > 1 else {}


@cache
def renders(prompts: tuple[str, ...]) -> Tensor:
    """Embeddings of pictures that show what the prompts ask and are otherwise as the world makes them."""
    rng, embedding, found = random.Random("renders"), Embedding.load(), []
    for prompt in prompts:
        asked, scenes = parse(prompt), []
        while len(scenes) < RENDERS:
            scene = sample_scene(rng)
            if adherence(asked, scene) == 1:
                scenes.append(scene)
        found.append(embedding(render(scenes)).double())
    return torch.cat(found)


def front(results: list[Result], price: str) -> list[Result]:
    """Those that no other beats in both the gain and a price, "adherence" or "wrong_pixels"; by gain, rising."""
    def cost(result: Result) -> float:
        return getattr(result, price)[0] * (-1 if price == "adherence" else 1)
    kept, best = [], float("inf")
    for result in sorted(results, key=lambda r: (-r.gain[0], cost(r))):
        if cost(result) < best:
            kept, best = [result, *kept], cost(result)
    return kept


def best_within(results: list[Result], points: float = KEPT) -> Result | None:
    """The largest gain at no more than so many points of adherence."""
    kept = [r for r in results if r.adherence[0] >= -points]
    return max(kept, key=lambda r: r.gain[0], default=None)


def best(results: list[Result]) -> Result:
    """The same; where there is none, what loses least of the prompt."""
    return best_within(results) or max(results, key=lambda r: r.adherence[0])


# ---------------------------------------------------------------------------------------------------------------------
# as text


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def within(value: Interval, form: str) -> str:
    """A value with its interval."""
    return f"{value[0]:{form}} ({value[1]:{form}} … {value[2]:{form}})"


def columns(by_prompt: list[Tensor], *forms: str) -> list[str]:
    """The mean of each column with its interval: for each prompt its groups (n, k), a form a column."""
    return [within(bootstrap(by_prompt, lambda m, i=i: m[..., i]), form) for i, form in enumerate(forms)]


def cells(result: Result) -> list[str]:
    return [within(result.gain, ".2f"), within(result.adherence, "+.1f"), within(result.gain_embedding, ".2f"),
            within(result.wrong_pixels, "+.0f"), f"{result.kid:.2f}", f"{100 * result.coverage:.0f} %"]


HEAD = ["Vendi × base", "adherence, points", "Vendi of embeddings × base", "wrong pixels", "KID", "coverage"]


def effect_table(results: Results, models: list[str]) -> str:
    """The checkpoints as they ship, without and with repulsion; the change is of the same prompts and seeds."""
    lines = []
    for model, setting in [(model, setting) for model in models for setting in SHIPPED]:
        by_prompt, change = defaultdict(list), results.result(model, setting)
        for (prompt, _), row in results.groups(model, setting).items():
            by_prompt[prompt].append([row[name] for name in ("vendi", "adherence", "wrong_pixels")])
        groups = [torch.tensor(rows, dtype=torch.float64) for rows in by_prompt.values()]
        if change:
            means = columns(groups, ".2f", ".1%", ".0f")
            changes = cells(change)[:2] + cells(change)[3:4] if setting else ["–"] * 3
            both = [cell for pair in zip(means, changes, strict=True) for cell in pair]
            lines.append([model + (", repelled" if setting else ""), *both, f"{change.groups}"])
    head = ["Vendi", "× base", "adherence", "points", "wrong pixels", "change", "groups"]
    return markdown(["as shipped", *head], lines)


def front_table(results: Results, model: str) -> str:
    """Each method at its best; the largest gain first, and last those that have none within KEPT points."""
    found = {method: best(settings) for method, settings in results.fronts(model).items()}
    rows = sorted(found.items(), key=lambda row: (row[1].adherence[0] < -KEPT, -row[1].gain[0]))
    lines = [[method, short(result.setting), *cells(result), f"{result.groups}"] for method, result in rows]
    return markdown(["method", "its best setting", *HEAD, "groups"], lines)


def short(setting: dict) -> str:
    """A setting in a few words."""
    inner = setting.get("repulsion", setting)
    return ", ".join(f"{name} {value}" for name, value in inner.items() if name not in ("method", "objective")) or "–"


def ablation_table(results: Results, model: str, name: str) -> str:
    return markdown([name, *HEAD], [[row, *cells(result)] for row, result in results.ablation(model, name).items()])


def batch_table(results: Results, model: str) -> str:
    """Vendi score over pairs: does a larger batch still differ picture by picture?"""
    lines = []
    for setting, images in [({}, max(BATCHES)), *[({"repulsion": {}}, images) for images in BATCHES]]:
        by_prompt = defaultdict(list)
        for (prompt, _), row in results.groups(model, setting, images).items():
            by_prompt[prompt].append([vendi_of_pairs([to_scene(text) for text in row["scenes"]]), row["adherence"]])
        scores = [torch.tensor(groups, dtype=torch.float64) for groups in by_prompt.values()]
        if scores:
            lines.append([f"{images}" if setting else "base, any number", *columns(scores, ".3f", ".1%")])
    return markdown(["pictures in a batch", "Vendi of pairs", "adherence"], lines)


def knob_table(results: Results, models: list[str]) -> str:
    """The same strength, and the same η, on every checkpoint: gain on each, and the largest over the smallest."""
    lines = []
    for name in KNOBS:
        found = [results.ablation(model, name) for model in models]
        for row in (row for row in found[0] if all(row in rows for rows in found)):
            gains = [rows[row].gain[0] for rows in found]
            kept = [f"{rows[row].gain[0]:.2f} ({rows[row].adherence[0]:+.1f})" for rows in found]
            lines.append([f"{name} {row}", *kept, f"{max(gains) / min(gains):.2f}"])
    return markdown(["push", *[f"{model}: gain (points)" for model in models], "largest / smallest"], lines)


def full_table(results: Results, models: list[str]) -> str:
    """Where the prompt says everything: what is shown of it, without and with repulsion, and with less guidance."""
    lines = []
    for model, setting in [(name, way) for name in models for way in told_everything(name)]:
        rows = list(results.groups(model, setting, full=True).values())
        measures = [torch.tensor([[row[name] for name in ("adherence", "unreadable", "wrong_pixels")]],
                                 dtype=torch.float64) for row in rows]
        if measures:
            way = ", repelled" if "repulsion" in setting else f", {short(setting)}" if setting else ""
            lines.append([model + way, *columns(measures, ".1%", ".1%", ".0f")])
    return markdown(["full prompts", "adherence", "unreadable", "wrong pixels"], lines)


def cost_table(costs: list[dict]) -> str:
    models = list(dict.fromkeys(row["model"] for row in costs))
    by = {(row["model"], row["method"]): row["ratio"] for row in costs}
    methods = dict.fromkeys(row["method"] for row in costs)
    lines = [[name, *[f"{by[m, name]:.3f}" if (m, name) in by else "–" for m in models]] for name in methods]
    return markdown(["time over the base's", *models], lines)


def report(rows: list[dict], costs: list[dict]) -> str:
    """All tables, one after the other, as Markdown."""
    results = Results(rows)
    models = [model for model in REGIMES if results.groups(model, {})]
    parts = ["# The paper in miniature: tables\n", "Made by `python -m benchmarks.paper` from its raw results.\n",
             "## The effect at the shipped settings\n", effect_table(results, models)]
    if len(models) > 1:
        parts += ["## One knob\n", knob_table(results, models)]
    for model in models:
        parts += [f"## {model}: {REGIMES[model]}\n", front_table(results, model)]
        for name in ablations(model):
            if name not in KNOBS and results.ablation(model, name):
                parts += [f"### {name}\n", ablation_table(results, model, name)]
        if results.groups(model, {}, max(BATCHES)):
            parts += ["### pictures in a batch\n", batch_table(results, model)]
    if any(results.groups(model, {}, full=True) for model in models):
        parts += ["## Full prompts\n", full_table(results, models)]
    if costs:
        parts += ["## Cost\n", cost_table(costs)]
    return "\n".join(parts)
