"""What guidance does to a checkpoint of the tiny world: `python -m benchmarks.guidance --model PATH`.

For each guidance scale, over prompts that say everything: the share of the prompted attributes that are present, that
of pictures in which all are, and of 10,000 pixels those that are clearly not what the renderer of the world would draw.
Over prompts that leave most to the model: the Vendi score of 4 pictures, and adherence. Writes a sheet of the pictures
of the full prompts at the scale of the best adherence, none picked.

Last it prints the guidance to ship: the lowest whose adherence is within half a point of the best, over the full
prompts and over the open ones. More guidance makes pictures more alike and buys nothing.
"""

import argparse
from pathlib import Path
from statistics import fmean as mean

from sampler import Pipeline, output

from .prompts import CHOICE, full_prompts
from .samples import measure


def lowest_as_good(adherence: dict[float, tuple[float, ...]]) -> float | None:
    """Guidance → adherence over several kinds of prompts, 0 to 1: the lowest guidance within half a point of the best
    for each kind, or None."""
    best = [max(kind) for kind in zip(*adherence.values(), strict=True)]
    return min((guidance for guidance, kept in adherence.items()
                if all(one >= top - 0.005 - 1e-9 for one, top in zip(kept, best, strict=True))), default=None)


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
    kept: dict[float, tuple[float, float]] = {}
    for guidance in args.guidance:
        call = {"images": 4, "guidance": guidance, "steps": args.steps}
        full, painted = measure(pipeline, full_prompts(args.prompts, args.seed), **call)
        opened, _ = measure(pipeline, CHOICE, **call)
        follows, whole, _, wrong, _ = map(mean, zip(*full, strict=True))
        in_open, *_, vendi = map(mean, zip(*opened, strict=True))
        print(f"| {guidance:g} | {follows:.1%} | {whole:.0%} | {wrong:.1f} | {vendi:.2f} | {in_open:.1%} |", flush=True)
        kept[guidance] = follows, in_open
        if args.out and (follows, in_open) == max(kept.values()):
            output.grid(painted, columns=10).save(args.out)
    print(f"\nlowest guidance within half a point of the best adherence on both: {lowest_as_good(kept)}")


if __name__ == "__main__":
    main()
