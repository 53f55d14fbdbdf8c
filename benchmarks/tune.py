"""How strongly should a checkpoint repel? `python -m benchmarks.tune --model PATH` proposes a dose and an η.

A handful of groups is painted with rising doses of `Repulsion(diversity=…)`. For each dose the table shows what comes
of it, and the η that would have pushed as far: the median over all pushes, and between which values it lies in the
blocks and steps. Where pictures can be read (the bundled checkpoints) the dose with the largest gain within three
points of adherence is proposed; elsewhere, look at the sheets of pictures and take the last that still shows what was
asked. Settings other than the dose are the checkpoint's, or what the options say.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from einops import rearrange
from torch import Tensor

from repulsion import Repulsion
from repulsion.objectives import OBJECTIVES, density_matrix
from repulsion.solvers import cosines, gram_matrix, mixing_matrix
from sampler import Pipeline, output
from sampler.options import blocks, exit_code
from sampler.report import describe_batch

from .prompts import OPEN

DOSES = (0.1, 0.25, 0.5, 0.75, 0.95)
PROMPTS = ["a person at a table", "a house by a lake", "an animal in the snow", "a street at night"]
KEPT = 0.03  # adherence that a dose may cost


def raised(gram: Tensor, mixing: Tensor, repulsion: Repulsion) -> float:
    """H of one group (1, B, B) once C has become C + E C."""
    moved = gram + mixing @ gram
    kernel, _ = cosines(moved + moved @ mixing.mT)
    return OBJECTIVES[repulsion.objective](density_matrix(kernel, repulsion.kernel_reg)).item()


def equivalent_scale(gram: Tensor, repulsion: Repulsion) -> float | None:
    """The η that raises H as far as the repulsion's diversity does: gram (1, B, B) float64. None where nothing moves.

    H rises with η up to a peak far beyond any useful dose; below it the η is found by bisection, to one in a thousand.
    """
    settings = repulsion.iterations, OBJECTIVES[repulsion.objective], repulsion.kernel_reg
    goal = raised(gram, mixing_matrix(gram, None, *settings, repulsion.diversity), repulsion)
    if not goal > raised(gram, 0 * gram, repulsion):
        return None

    def reaches(scale: float) -> bool:
        return raised(gram, mixing_matrix(gram, scale, *settings), repulsion) >= goal

    high = 1e-6 * gram[0].diagonal().mean().item()  # η has the unit of a squared length
    while not reaches(high):
        high *= 2
        if not math.isfinite(high):
            return None
    low = high / 2
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Measured(Repulsion):
    """A repulsion that notes, for each push, the η that would have gone as far."""

    scales: list = field(default_factory=list)

    def _repel(self, tokens: Tensor, groups: int) -> Tensor:
        vectors = rearrange(tokens, "(g b) n d -> g b (n d)", g=groups)
        grams = gram_matrix(vectors)[-1:] if self.branches == "conditional" else gram_matrix(vectors)
        self.scales.extend(scale for gram in grams.split(1) if (scale := equivalent_scale(gram, self)))
        return super()._repel(tokens, groups)


def try_dose(pipeline: Pipeline, repulsion: Repulsion | None, prompts: list[str], seeds: int,
             images: int) -> tuple[dict, list]:
    """Means over all groups of Vendi score and adherence (None where it cannot be read), the scales, and pictures."""
    call = {}
    if repulsion is not None:
        call["repulsion"] = Measured(**{name: getattr(repulsion, name) for name in Repulsion.__dataclass_fields__})
    found, pictures = [], []
    for prompt in prompts:
        for seed in range(seeds):
            batch = pipeline(prompt, images, seed=seed, progress=f"{prompt}, seed {seed}", **call)
            found.append(describe_batch(batch, prompt, pipeline.defaults.world))
            pictures += batch if seed == 0 else []
    kept = [one["adherence"] for one in found if one.get("adherence") is not None]
    return {"vendi": sum(one["vendi"] for one in found) / len(found),
            "adherence": sum(kept) / len(kept) if kept else None,
            "scales": call["repulsion"].scales if call else []}, pictures


def line(name: str, found: dict, base: dict) -> str:
    """One row of the table."""
    kept = "–" if found["adherence"] is None else f"{100 * found['adherence']:.1f} %"
    scales = sorted(found["scales"])
    eta = f"{median(scales):.1e} ({scales[0]:.0e} … {scales[-1]:.0e})" if scales else "–"
    return f"| {name} | {found['vendi']:.2f} | {found['vendi'] / base['vendi']:.2f} | {kept} | {eta} |"


def propose(doses: dict[float, dict], base: dict) -> float | None:
    """The dose with the largest Vendi score that keeps the prompt, None where that cannot be told."""
    if base["adherence"] is None:
        return None
    kept = [dose for dose, found in doses.items() if found["adherence"] >= base["adherence"] - KEPT]
    return max(kept, key=lambda dose: doses[dose]["vendi"], default=None)


def run(args: argparse.Namespace) -> None:
    pipeline = Pipeline.load(args.model)
    start = pipeline.defaults.repulsion or Repulsion(diversity=DOSES[0])
    said = {name: getattr(args, name) for name in ("site", "blocks", "steps") if getattr(args, name) is not None}
    start = replace(start, scale=None, diversity=DOSES[0], **said)
    start.check_blocks(pipeline.config.num_blocks)
    prompts = args.prompts or (OPEN[::4] if pipeline.defaults.world == "tiny" else PROMPTS)
    base, pictures = try_dose(pipeline, None, prompts, args.seeds, args.images)
    sheets, doses = {"base": output.grid(pictures, args.images)}, {}
    print("| diversity | Vendi | × base | adherence | η that goes as far: median (range) |\n|" + "---|" * 5)
    print(line("base", base, base), flush=True)
    for dose in DOSES:
        doses[dose], pictures = try_dose(pipeline, replace(start, diversity=dose), prompts, args.seeds, args.images)
        sheets[f"diversity-{dose}"] = output.grid(pictures, args.images)
        print(line(f"{dose}", doses[dose], base), flush=True)
    with output.whole_folder(args.out, overwrite=True) as folder:
        for name, sheet in sheets.items():
            sheet.save(folder / f"{name}.png")
    best = propose(doses, base)
    if best is None:
        print(f"look at {args.out}: the last sheet that still shows what was asked is your dose")
    else:
        print(f"proposed: diversity {best}, or scale {median(doses[best]['scales']):.1e} (pictures in {args.out})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3", help="a bundled checkpoint, a folder, a file, or a hub's name")
    parser.add_argument("--prompts", nargs="+", help="open ones, which leave much to the model")
    parser.add_argument("--seeds", type=int, default=2, help="groups a prompt (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="pictures in a group (default: %(default)s)")
    parser.add_argument("--site", choices=["attention", "block"])
    parser.add_argument("--blocks", type=blocks, help="all, first, middle, last, or indices such as 0-3,7")
    parser.add_argument("--steps", type=int, help="τ, the steps that repel")
    parser.add_argument("--out", type=Path, default=Path("outputs/tune"), help="folder for pictures, replaced")
    return exit_code(run, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
