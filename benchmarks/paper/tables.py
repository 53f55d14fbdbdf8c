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
from .plan import BATCHES, FULL, GROUP, REGIMES, ablations, fronts, told_everything

KEPT = 3.0  # points of adherence that a method may lose where one figure is to stand for its whole front
CAPS = 1, KEPT, 8  # likewise, for the second round
RENDERS = 64  # for each prompt, what KID compares with
Interval = tuple[float, float, float]  # value, and the ends of its 95 % interval


@dataclass(frozen=True)
class Result:
    """A setting in numbers, against the base on the same prompts and seeds.

    gain, gain_embedding: Vendi score over the base's; adherence: its change, in points of 100; wrong_pixels: its
    change; coverage: share of the open values; kid: distance to renders of what the prompts ask; slower: time over
    the base's, as it was in a run with other work beside it; groups: how many it was measured on
    """

    method: str
    setting: dict
    gain: Interval
    gain_embedding: Interval
    adherence: Interval
    wrong_pixels: Interval
    coverage: float
    kid: float
    slower: float
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

    def result(self, model: str, method: str, setting: dict, images: int = GROUP) -> Result | None:
        """None where nothing was painted with this setting, or no base to compare with."""
        mine, base = self.groups(model, setting, images), self.groups(model, {}, images)
        both = [key for key in mine if key in base]
        if not both:
            return None
        pairs = defaultdict(list)
        for key in both:
            names = ("vendi", "vendi_embedding", "adherence", "wrong_pixels", "milliseconds")
            pairs[key[0]].append([[row[name] for name in names] for row in (mine[key], base[key])])
        by_prompt = [torch.tensor(groups, dtype=torch.float64).flatten(1) for groups in pairs.values()]  # (n, 10)
        times = torch.cat(by_prompt)[:, [4, 9]]
        shown = {prompt: [to_scene(text) for key in both if key[0] == prompt for text in mine[key]["scenes"]]
                 for prompt in pairs}
        return Result(
            method, setting,
            bootstrap(by_prompt, lambda m: m[..., 0] / m[..., 5]),
            bootstrap(by_prompt, lambda m: m[..., 1] / m[..., 6]),
            bootstrap(by_prompt, lambda m: 100 * (m[..., 2] - m[..., 7])),
            bootstrap(by_prompt, lambda m: m[..., 3] - m[..., 8]),
            mean([values_reached(prompt, scenes) for prompt, scenes in shown.items()]),
            kernel_distance(torch.cat([vectors_of(mine[key]) for key in both]), renders(tuple(sorted(pairs)))),
            (times[:, 0] / times[:, 1]).median().item(), len(both),
        )  # fmt: skip

    def front_results(self, model: str) -> dict[str, list[Result]]:
        """Method → what each of its settings came to, the base's own among the first."""
        found = {method: [self.result(model, method, setting) for setting in settings]
                 for method, settings in fronts(model).items()}
        return {method: [r for r in results if r] for method, results in found.items() if any(results)}


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


def finalist_settings(results: Results, models: list[str]) -> dict[tuple[str, str], list[dict]]:
    """(model, method) → its settings that deserve a longer look: the largest gain within each of CAPS points."""
    found = {}
    for model in models:
        for method, tried in results.front_results(model).items():
            best = [best_within([r for r in tried if r.gain[0] > 1], points) for points in CAPS]
            found[model, method] = list({json.dumps(r.setting): r.setting for r in best if r}.values())
    return found


def longest_seen(results: list[Result]) -> list[Result]:
    """Those that were measured on most groups: a method's finalists, where there was a second round."""
    most = max((r.groups for r in results), default=0)
    return [r for r in results if r.groups == most]


def best_within(results: list[Result], points: float = KEPT) -> Result | None:
    """The largest gain at no more than so many points of adherence, of `longest_seen`."""
    kept = [r for r in longest_seen(results) if r.adherence[0] >= -points]
    return max(kept, key=lambda r: r.gain[0], default=None)


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


def front_table(results: Results, model: str) -> str:
    """Each method at its largest gain within KEPT points of adherence; the largest first."""
    base = results.result(model, "base", {})
    best = {method: best_within(found) for method, found in results.front_results(model).items()}
    shipped = results.result(model, "contextual repulsion, as shipped", {"repulsion": {}})
    rows = sorted([r for r in [*best.values(), shipped] if r], key=lambda r: -r.gain[0])
    lines = [[r.method, short(r.setting), *cells(r), str(r.groups)] for r in [*rows, base]]
    none = f"none within {KEPT:g} points on as many groups"
    lines += [[method, none, *["–"] * (len(HEAD) + 1)] for method, found in best.items() if not found]
    return markdown(["method", "its best setting", *HEAD, "groups"], lines)


def short(setting: dict) -> str:
    """A setting in a few words."""
    inner = setting.get("repulsion", setting)
    return ", ".join(f"{name} {value}" for name, value in inner.items() if name not in ("method", "tokens")) or "–"


def ablation_table(results: Results, model: str, name: str) -> str:
    found = {row: results.result(model, row, setting) for row, setting in ablations(model)[name].items()}
    return markdown([name, *HEAD], [[row, *cells(r)] for row, r in found.items() if r])


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
    """The same dose in every checkpoint, as `diversity` and as η: gain in each, and the largest over the smallest."""
    lines = []
    for name in ("knob", "η"):
        for row in ablations(models[0])[name]:
            found = [results.result(model, row, ablations(model)[name][row]) for model in models]
            if all(found):
                gains = [r.gain[0] for r in found]
                spread = max(gains) / min(gains)
                kept = [f"{r.gain[0]:.2f} ({r.adherence[0]:+.1f})" for r in found]
                lines.append([f"{'diversity' if name == 'knob' else 'η'} {row}", *kept, f"{spread:.2f}"])
    return markdown(["dose", *[f"{model}: gain (points)" for model in models], "largest / smallest"], lines)


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
    parts = ["# The paper in miniature: tables\n", "Made by `python -m benchmarks.paper` from its raw results.\n"]
    for model in models:
        parts += [f"## {model}: {REGIMES[model]}\n", front_table(results, model)]
        for name in ablations(model):
            if name not in ("η", "knob") and results.result(model, "", next(iter(ablations(model)[name].values()))):
                parts += [f"### {name}\n", ablation_table(results, model, name)]
        if results.groups(model, {}, max(BATCHES)):
            parts += ["### pictures in a batch\n", batch_table(results, model)]
    if any(results.groups(model, {}, full=True) for model in models):
        parts += ["## Full prompts\n", full_table(results, models)]
    if len(models) > 1:
        parts += ["## One knob\n", knob_table(results, models)]
    if costs:
        parts += ["## Cost\n", cost_table(costs)]
    return "\n".join(parts)
