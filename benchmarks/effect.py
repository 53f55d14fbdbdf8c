"""Does it work? Diversity and adherence on tiny-sd3, with and without repulsion: `python -m benchmarks.effect`.

Groups of 4 pictures of one prompt. Vendi score: of the attributes read off the pictures, 1 to 4. Adherence: share of
the prompted attributes that are present. Intervals: 95 %, bootstrapped over the prompts. About two minutes a row.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from repulsion import vendi_score
from sampler import Pipeline
from sampler.report import to_pixels
from weights.tiny.captions import describe, parse
from weights.tiny.reader import adherence, attribute_vectors, read
from weights.tiny.world import sample_scene

from .paper.measures import unreadable

OPEN = [  # underspecified: each leaves most attributes to the model
    "a circle", "a square", "a triangle", "a star", "a cross", "a ring",
    "a large circle", "a small square", "a triangle on a striped ground", "a star on a plain ground",
    "a cross on the left", "a ring at the bottom", "a red shape", "a yellow shape", "a green shape in the center",
    "a circle and a square", "a star above a ring", "a cross left of a triangle", "a circle, a star and a ring",
    "a square, a triangle and a cross in a row",
]  # fmt: skip


def full_prompts(count: int, seed: int = 2024) -> list[str]:
    """Prompts that say everything."""
    rng = random.Random(seed)
    return [describe(sample_scene(rng)) for _ in range(count)]


def measure(pipeline: Pipeline, prompts: list[str], groups: int, label: str, **call) -> list[dict]:
    """Vendi score and adherence of every group; the seeds are the group numbers, the same for every row."""
    rows = []
    for prompt in tqdm(prompts, desc=label, leave=False):
        for seed in range(groups):
            start = time.perf_counter()
            pictures = pipeline(prompt, 4, seed=seed, **call)
            seconds = time.perf_counter() - start
            scenes = read(to_pixels(pictures))
            kept = sum(adherence(parse(prompt), scene) for scene in scenes) / len(scenes)
            rows.append({
                "prompt": prompt, "seed": seed, "vendi": vendi_score(attribute_vectors(scenes)).item(),
                "adherence": kept, "unreadable": sum(map(unreadable, scenes)) / len(scenes), "seconds": seconds,
            })  # fmt: skip
    return rows


def interval(rows: list[dict], key: str, draws: int = 2000) -> tuple[float, float, float]:
    """Mean, and the 95 % interval from resampling whole prompts."""
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row[key])
    means = torch.tensor([sum(values) / len(values) for values in by_prompt.values()])
    picks = torch.randint(len(means), (draws, len(means)), generator=torch.Generator().manual_seed(0))
    low, high = means[picks].mean(dim=1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return means.mean().item(), low, high


def settings(pipeline: Pipeline) -> dict[str, dict]:
    """The rows of the table: arguments of a pipeline call."""
    default = pipeline.defaults.repulsion
    paper = replace(default, scale=4e6, diversity=None, iterations=10, steps=5, blocks=(0, 1, 2, 3, 4),
                    site="attention", branches="all")
    return {
        "base": {},
        "repulsion (shipped)": {"repulsion": default},
        "diversity 0.5": {"repulsion": replace(default, diversity=0.5)},
        "both branches": {"repulsion": replace(default, branches="all")},
        "site = attention": {"repulsion": replace(default, site="attention")},
        # the best of the paper's own kind that was found
        "site = attention, both branches, η 4e6, 5 steps, blocks 0 to 4": {"repulsion": paper},
        "middle third of the blocks": {"repulsion": replace(default, blocks="middle")},
        "last third of the blocks": {"repulsion": replace(default, blocks="last")},
        "all blocks": {"repulsion": replace(default, blocks="all")},
        "image tokens": {"repulsion": replace(default, tokens="image")},
        "base, guidance 2": {"guidance": 2.0},
    }


def table_row(name: str, open: list[dict], full: list[dict], base: list[dict]) -> str:
    """One line of the printed table; `open` and `base` on the underspecified prompts, `full` on the full ones."""
    vendi, kept, full_kept = interval(open, "vendi"), interval(open, "adherence"), interval(full, "adherence")
    seconds = statistics.median(row["seconds"] for row in open)
    cells = [
        name, f"{vendi[0]:.2f} ({vendi[1]:.2f}–{vendi[2]:.2f})", f"{vendi[0] / interval(base, 'vendi')[0]:.2f}",
        f"{100 * kept[0]:.1f} % ({100 * kept[1]:.1f}–{100 * kept[2]:.1f})", f"{100 * full_kept[0]:.1f} %",
        f"{100 * interval(open, 'unreadable')[0]:.1f} %", f"{seconds:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--groups", type=int, default=5, help="groups of 4 per prompt")
    parser.add_argument("--rows", nargs="*", help="only these rows; rows that --out has already are not run again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/effect.json"))
    args = parser.parse_args()
    pipeline = Pipeline.load(args.model)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name, call in settings(pipeline).items():
        if name in results or (args.rows and name not in args.rows):
            continue
        found = measure(pipeline, OPEN, args.groups, name, **call)
        full = measure(pipeline, full_prompts(20), 1, name + ", full prompts", **call)
        results[name] = {"open": found, "full": full}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("| | Vendi | × base | adherence | adherence, full prompts | unreadable | seconds |\n|" + "---|" * 7)
    for name in [name for name in settings(pipeline) if name in results]:
        print(table_row(name, **results[name], base=results.get("base", results[name])["open"]))


if __name__ == "__main__":
    main()
