"""PORTING.md: the guide to a kit, made of a fixed text, the formulas' functions and the manifest's rows."""

from itertools import groupby
from typing import Any

from .evaluate import FUNCTIONS, HERE, edits, used_by
from .stages import Entry, Run

FRAME = (HERE / "page.md").read_text(encoding="utf-8")


def page(run: Run, rows: list[dict[str, Any]], folder: str, margin: int) -> str:
    """The page as Markdown; `rows` as in manifest.json."""
    r, done, dual = run.repulsion, set(), run.configs["transformer"].num_dual_blocks
    half = run.samples // 2 if run.branches > 1 and r.branches == "conditional" else 0
    push = next((row["formula"] for row in rows if row["name"].endswith("repulsion.mixing")), "the tokens stay")
    known = {x: y for x, y in vars(run).items() if x not in ("tokens", "repulsion", "configs")} | run.configs
    parts = [FRAME.format(
        model=run.model, prompts=" and ".join(f"“{prompt}”" for prompt in run.prompts[run.branches - 1 :]),
        count=len(rows), folder=folder, margin=margin, samples=run.samples, batch=run.batch, step=r.start,
        settings="\n".join(f"- {name}: `{value}`" for name, value in known.items()), last=r.start + r.steps - 1,
        blocks=", ".join(f"dual.{i}" if i < dual else f"single.{i - dual}" for i in run.repels_in),
        images=run.images, first=half, until=run.samples - 1, tokens=r.single_stream_tokens, iterations=r.iterations,
        length=f"η / M = {r.scale} / {r.iterations} times the gradient" if r.strength is None else
        f"s / M = {r.strength} / {r.iterations} times as long as the group was before the first, ‖C‖",
        push=functions([push], done) + f"\nE = {push}")]
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        group = list(group)
        code = functions([row["formula"] for row in group], done)
        parts += [f"## {stage}", "", *([f"```python\n{code}```", ""] if code else []),
                  "| tensor | shape | formula | from | weights | tolerance |", "|---|---|---|---|---|---|"]
        parts += [line(row) for row in group]
        words = {words: 0 for row in group for _, words in edits(Entry(*(row[x] for x in Entry._fields)))}
        parts += ["", *([f"Usual mistakes: {'; '.join(words)}.", ""] if words else [])]
    return "\n".join(parts)


def functions(formulas: list[str], done: set[str]) -> str:
    new = [name for name in FUNCTIONS if name not in done and any(name in used_by(formula) for formula in formulas)]
    done |= {*new}
    return "\n".join(FUNCTIONS[name] for name in new)


def line(row: dict[str, Any]) -> str:
    inputs = ", ".join(f"{x} = `{name}`" for x, name in row["inputs"].items())
    fed, whole = (row["tolerance"]["float32"][kind] for kind in ("fed", "whole"))
    formula = f"`{row['formula']}`" if row["formula"] else row["words"]
    return (f"| `{row['name']}` | {' × '.join(map(str, row['shape']))} {row['dtype']} | "
            f"{formula} | {inputs} | {', '.join(row['weights'])} | {fed:.1e} / {whole:.1e} |")
