"""What guidance does to a checkpoint of the tiny world: `python -m benchmarks.guidance --model PATH`.

For each guidance scale, over prompts that say everything: the share of the prompted attributes that are present, that
of pictures in which all are, and of 10,000 pixels those that are clearly not what the renderer of the world would draw.
Over prompts that leave most to the model: the Vendi score of 4 pictures, and adherence. Writes a sheet of the pictures
of the full prompts at the scale of the best adherence, none picked.

Last it prints the guidance to ship: the lowest whose adherence, over the full prompts, is within half a point of the
best. More guidance makes pictures more alike and buys nothing.
"""

import argparse
from pathlib import Path

from repulsion import vendi_score
from sampler import Pipeline, output
from sampler.report import to_pixels
from tiny.captions import parse
from tiny.drawing import wrong_pixels
from tiny.reader import adherence, attribute_vectors, read

from .paper.measures import mean
from .prompts import CHOICE, full_prompts


def measure(pipeline: Pipeline, prompts: list[str], guidance: float, steps: int | None) -> tuple[list[float], list]:
    """Means over the prompts of adherence, all of it, wrong pixels of 10,000 and Vendi score; and the pictures."""
    rows, painted = [], []
    for prompt in prompts:
        pictures = pipeline(prompt, 4, guidance=guidance, steps=steps)
        pixels = to_pixels(pictures)
        scenes = read(pixels)
        kept = [adherence(parse(prompt), scene) for scene in scenes]
        rows.append([mean(kept), mean([k == 1 for k in kept]), mean(wrong_pixels(pixels)),
                     vendi_score(attribute_vectors(scenes)).item()])
        painted += pictures
    return [mean(column) for column in zip(*rows, strict=True)], painted


def lowest_as_good(adherence: dict[float, float]) -> float:
    """Guidance → adherence, 0 to 1: the lowest guidance within half a point of the best."""
    return min(guidance for guidance, kept in adherence.items() if kept >= max(adherence.values()) - 0.005 - 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3", help="name or folder (default: %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 3, 4.5, 6])
    parser.add_argument("--prompts", type=int, default=50, help="full prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=2025, help="of the full prompts (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="PNG file of the sheet")
    args = parser.parse_args()
    pipeline = Pipeline.load(args.model)
    print("| guidance | adherence | all of it | wrong pixels of 10,000 | open prompts: Vendi | adherence |\n"
          "|---|---|---|---|---|---|")
    kept: dict[float, float] = {}
    for guidance in args.guidance:
        full, painted = measure(pipeline, full_prompts(args.prompts, args.seed), guidance, args.steps)
        opened, _ = measure(pipeline, CHOICE, guidance, args.steps)
        print(f"| {guidance:g} | {full[0]:.1%} | {full[1]:.0%} | {full[2]:.1f} | {opened[3]:.2f} | {opened[0]:.1%} |",
              flush=True)
        if args.out and full[0] > max(kept.values(), default=0.0):
            output.grid(painted, columns=10).save(args.out)
        kept[guidance] = full[0]
    print(f"\nlowest guidance within half a point of the best adherence: {lowest_as_good(kept):g}")


if __name__ == "__main__":
    main()
