"""The results as text: tables in Markdown."""

from collections import defaultdict

import torch
from torch import Tensor

from .measures import Interval, interval, over_prompts, to_scene, vendi_of_pairs
from .plan import BATCHES, KNOBS, REGIMES, SIZES, Job, ablations, but, by_strength, settings, stages, told_everything
from .results import ALLOWED, MIDDLE, OURS, Result, Results

HEAD = ["Vendi × base", "adherence, points", "Vendi of embeddings × base", "wrong pixels", "KID", "coverage"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def within(value: Interval, form: str) -> str:
    """A value with its interval."""
    return f"{value[0]:{form}} ({value[1]:{form}} … {value[2]:{form}})"


def columns(by_prompt: list[Tensor], *forms: str) -> list[str]:
    """The mean of each column with its interval: for each prompt its groups (n, k), a form a column."""
    return [within(interval(by_prompt, lambda m, i=i: m[..., i]), form) for i, form in enumerate(forms)]


def cells(result: Result) -> list[str]:
    return [within(result.gain, ".2f"), within(result.adherence, "+.1f"), within(result.gain_embedding, ".2f"),
            within(result.wrong_pixels, "+.0f"), f"{result.kid:.2f}", f"{100 * result.coverage:.0f} %"]


def short(setting: dict) -> str:
    """A setting in a few words."""
    words = {**setting.get("repulsion", {}), **setting}
    return ", ".join(f"{name} {value}" for name, value in words.items()
                     if name not in ("method", "objective", "repulsion", "place")) or "–"


def effect_table(results: Results, models: list[str]) -> str:
    """The checkpoints as they ship, without and with repulsion; the change is of the same prompts and seeds.

    The gain's second interval is over the prompts: how far it may differ on others like these.
    """
    lines = []
    for model, setting in [(name, way) for name in models for way in ({}, but(name))]:
        by_prompt, change = defaultdict(list), results.result(model, setting)
        for (prompt, seed), row in results.groups(model, setting).items():
            base = results.groups(model, {}).get((prompt, seed), {"vendi": torch.nan})
            by_prompt[prompt].append([row["vendi"], row["adherence"], row["wrong_pixels"], base["vendi"]])
        groups = [torch.tensor(rows, dtype=torch.float64) for rows in by_prompt.values()]
        if change:
            means, changes = columns(groups, ".2f", ".1%", ".0f"), ["–"] * 4
            if setting:
                gain, points, _, pixels = cells(change)[:4]
                wide = interval(over_prompts(groups), lambda m: m[..., 0] / m[..., 3])
                changes = [gain, f"{wide[1]:.2f} … {wide[2]:.2f}", points, pixels]
            lines.append([model + (", repelled" if setting else ""), means[0], *changes[:2], means[1], changes[2],
                          means[2], changes[3], f"{change.groups}"])
    head = ["Vendi", "× base", "other prompts", "adherence", "points", "wrong pixels", "change", "groups"]
    return markdown(["as shipped", *head], lines)


def equal_table(results: Results, model: str) -> str:
    """Each method's gain at equal adherence: what was chosen for 1, 2 and 3 points, the points it loses here, and
    contextual repulsion over it."""
    found = results.verdict(model)
    order = [*results.ranked(model), *found]
    lines = []
    for method in dict.fromkeys(order):
        line = [method]
        for points in ALLOWED:
            if result := found[method].get(points):
                ahead = method != OURS and results.ahead(model, result.setting)
                line += [within(result.gain, ".2f"), f"{result.adherence[0]:+.1f}",
                         within(ahead, ".2f") if ahead else "–"]
            else:
                line += ["none" if points in found[method] else "not painted", "–", "–"]
        lines.append(line)
    head = [cell for p in ALLOWED for cell in (f"{p} point{'s' if p > 1 else ''}: Vendi × base", "here",
                                               "contextual over it")]
    return markdown(["method", *head], lines)


def strength_table(results: Results, model: str) -> str:
    """Contextual repulsion at rising strengths."""
    found = [(setting, results.result(model, setting)) for setting in by_strength(model)]
    return markdown(["contextual repulsion", *HEAD, "groups"],
                    [[short(setting), *cells(result), f"{result.groups}"] for setting, result in found if result])


def verdict_table(results: Results, model: str, costs: list[dict]) -> str:
    """Each method as it was chosen for MIDDLE points, the largest gain first."""
    ranked, lines = results.ranked(model), []
    for method, result in ranked.items():
        times = [row["ratio"] for row in costs if (row["model"], row["setting"]) == (model, result.setting)]
        lines.append([method, short(result.setting), *cells(result), f"{times[0]:.2f}" if times else "–",
                      f"{result.groups}"])
    head = ["method", "setting", *HEAD, "time × base", "groups"]
    missing = [f"{method} ({min(lost for _, _, lost in results.tried(model, method)):.1f} points)"
               for method, one in results.verdict(model).items() if one.get(MIDDLE, True) is None]
    text = f"\nNo setting loses {MIDDLE} points or less, on the prompts to choose on, of: {', '.join(missing)}.\n"
    return markdown(head, lines) + (text if missing else "")


def summary_table(results: Results, models: list[str]) -> str:
    """Each method at the first of its finalists, on each checkpoint, and contextual repulsion over it."""
    lines: dict[str, list[str]] = {}
    for place, model in enumerate(models):
        for method, (found, ahead) in results.beside(model).items():
            line, own = lines.setdefault(method, ["–", "–"] * len(models)), slice(2 * place, 2 * place + 2)
            line[own] = f"{found.gain[0]:.2f} ({found.adherence[0]:+.1f})", within(ahead, ".2f")
    head = [cell for model in models for cell in (f"{model}: gain (points)", "contextual over it")]
    return markdown(["method", *head], [[method, *line] for method, line in lines.items()])


def choice_table(results: Results, model: str) -> str:
    """What was tried on the prompts to choose on."""
    return markdown(["method", "setting", "Vendi × base", "adherence, points"], [
        [method, short(setting), f"{gain:.2f}", f"{round(-lost, 1) + 0:+.1f}"]
        for method in settings(model) for setting, gain, lost in results.tried(model, method)])


def ablation_table(results: Results, model: str, name: str) -> str:
    return markdown([name, *HEAD], [[row, *cells(result)] for row, result in results.ablation(model, name).items()])


def batch_table(results: Results, model: str) -> str:
    """Vendi score over pairs: does a larger batch still differ picture by picture?"""
    lines = []
    for setting, images in [({}, max(BATCHES)), *[(but(model), images) for images in BATCHES]]:
        by_prompt, prompts = defaultdict(list), {prompt for prompt, _ in results.groups(model, {}, max(BATCHES))}
        for (prompt, seed), row in results.groups(model, setting, images).items():
            if prompt in prompts and seed < BATCHES[images]:
                pairs = vendi_of_pairs([to_scene(text) for text in row["scenes"]])
                by_prompt[prompt].append([pairs, row["adherence"]])
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
        rows = list(results.groups(model, setting, of="full").values())
        measures = [torch.tensor([[row[name] for name in ("adherence", "unreadable", "wrong_pixels")]],
                                 dtype=torch.float64) for row in rows]
        if measures:
            way = ", repelled" if "repulsion" in setting else f", {short(setting)}" if setting else ""
            lines.append([model + way, *columns(measures, ".1%", ".1%", ".0f")])
    return markdown(["full prompts", "adherence", "unreadable", "wrong pixels"], lines)


def report(rows: list[dict], costs: list[dict]) -> str:
    """All tables, one after the other, as Markdown."""
    results = Results(rows)
    models = [model for model in REGIMES if results.groups(model, {})]
    planned = {job.key for _, jobs in stages(models, SIZES["full"], results.finalists) for job in jobs}
    painted = len(planned & {Job.of(row).key for row in rows})
    parts = ["# The paper in miniature: tables\n", "Made by `python -m benchmarks.paper` from its raw results.\n",
             f"Painted so far: {painted:,} of {len(planned):,} groups of the full plan.\n",
             "## The effect at the shipped settings\n", effect_table(results, models)]
    if any(results.verdict(model) for model in models):
        parts += ["## Contextual repulsion beside the others\n", summary_table(results, models)]
    for model in models:
        if results.verdict(model):
            parts += [f"## {model}: {REGIMES[model]}\n", "### By strength\n", strength_table(results, model),
                      "### Gain at equal adherence\n", equal_table(results, model),
                      f"### At {MIDDLE} points\n", verdict_table(results, model, costs)]
    if len(models) > 1 and results.ablation(models[0], KNOBS[0]):
        parts += ["## One knob\n", knob_table(results, models)]
    for model in models:
        for name in ablations(model):
            if name not in KNOBS and results.ablation(model, name):
                parts += [f"## {model}: {name}\n", ablation_table(results, model, name)]
        if results.groups(model, {}, max(BATCHES)):
            parts += [f"## {model}: pictures in a batch\n", batch_table(results, model)]
        if results.verdict(model):
            parts += [f"## {model}: what was tried on the prompts to choose on\n", choice_table(results, model)]
    if any(results.groups(model, {}, of="full") for model in models):
        parts += ["## Full prompts\n", full_table(results, models)]
    return "\n".join(parts)
