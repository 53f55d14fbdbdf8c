"""What the bundled checkpoints paint, and how well they do what a full prompt says: `python -m benchmarks.samples`.

Writes a sheet of pictures, the same prompts and seeds for all, none picked, and prints for each checkpoint over prompts
that say everything: the share of the prompted attributes that are present, the share of pictures in which all are, the
share of attributes that cannot be read, and of 10,000 pixels those that are clearly not what the world's renderer would
draw there. 95 % intervals, over the prompts.
"""

import argparse
from pathlib import Path
from statistics import fmean as mean

import torch

from repulsion import vendi_score
from sampler import Pipeline
from sampler.report import to_pixels
from tiny.captions import parse
from tiny.drawing import wrong_pixels
from tiny.reader import adherence, attribute_vectors, read
from weights import BUNDLED

from .paper.measures import unreadable
from .paper.tables import columns
from .prompts import full_prompts
from .sheets import sheet, stacked

PROMPTS = ["a circle", "a square and a star", "a large red cross on the left on a dotted teal ground",
           "a circle, a star and a ring", "a small white ring above a large blue square on a plain brown ground",
           "a triangle at the top on a dotted ground"]  # fmt: skip
SIDE_BY_SIDE = 2  # prompts


def paint(pipelines: dict[str, Pipeline]):
    """The sheet of PROMPTS, two side by side."""
    sheets = []
    for i in range(0, len(PROMPTS), SIDE_BY_SIDE):
        prompts = PROMPTS[i : i + SIDE_BY_SIDE]
        sheets.append(sheet({name: [picture for prompt in prompts for picture in pipeline(prompt, 4, seed=0)]
                             for name, pipeline in pipelines.items()}, prompts))
    return stacked(sheets)


def measure(pipeline: Pipeline, prompts: list[str], images: int, **call) -> tuple[list[list[float]], list]:
    """For each prompt, over its pictures, the means of the four measures, and the Vendi score; and all pictures."""
    found, painted = [], []
    for prompt in prompts:
        painted += (pictures := pipeline(prompt, images, seed=0, **call))
        pixels = to_pixels(pictures)
        scenes, asked = read(pixels), parse(prompt)
        kept = [adherence(asked, scene) for scene in scenes]
        found.append([mean(kept), mean([k == 1 for k in kept]), mean([unreadable(scene) for scene in scenes]),
                      mean(wrong_pixels(pixels)), vendi_score(attribute_vectors(scenes)).item()])
    return found, painted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BUNDLED))
    parser.add_argument("--prompts", type=int, default=100, help="full prompts to measure on (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="pictures of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/samples.png"))
    args = parser.parse_args()
    pipelines = {name: Pipeline.load(name) for name in args.models}
    paint(pipelines).save(args.out, optimize=True)
    print("| | adherence | all of it | unreadable | wrong pixels of 10,000 |\n|---|---|---|---|---|")
    for name, pipeline in pipelines.items():
        found, _ = measure(pipeline, full_prompts(args.prompts), args.images)
        by_prompt = [torch.tensor([one], dtype=torch.float64) for one in found]
        print(f"| {name} | {' | '.join(columns(by_prompt, '.1%', '.0%', '.1%', '.0f'))} |", flush=True)
    print(f"pictures in {args.out}")


if __name__ == "__main__":
    main()
