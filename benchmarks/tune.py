"""How strongly should a checkpoint repel? `python -m benchmarks.tune --model PATH` proposes a strength and an η.

A handful of groups is painted with rising strengths, each push one gradient step (M = 1). The η that goes as far as a
strength is then the length of that step: the table shows its median over all pushes, and its range over the blocks and
steps. Where pictures can be read (the bundled checkpoints) the strength with the largest gain within three points of
adherence is proposed; elsewhere, look at the sheets of pictures and take the last that still shows what was asked.
Other settings are the checkpoint's, or what the options say.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from repulsion import Repulsion
from repulsion.repel import gram_matrix
from repulsion.solvers import gradient_matrix, mixing_matrix
from sampler import Pipeline, output
from sampler.folders import whole_folder
from sampler.options import blocks, exit_code
from sampler.report import describe_batch

from .prompts import CHOICE

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
PROMPTS = ["a person at a table", "a house by a lake", "an animal in the snow", "a street at night"]
KEPT = 0.03  # adherence that a push may cost
FILES = r"summary\.json|(base|strength-.*)\.png"


@dataclass(frozen=True)
class Measured(Repulsion):
    """A repulsion with M = 1 that notes, for each push, the η that goes as far: L in E = L · D."""

    scales: list = field(default_factory=list)

    def bind(self, block: int, num_blocks: int, groups: int = 1,
             num_context: int | None = None) -> Callable[[Tensor], Tensor] | None:
        push = super().bind(block, num_blocks, groups, num_context)
        first = None if self.single_stream_tokens == "all" else num_context

        def noted(tokens: Tensor) -> Tensor:
            c = tokens.cpu() if tokens.device.type == "mps" else tokens  # MPS has no float64
            c = rearrange(c[:, :first], "(g b) n d -> g b n d", g=groups)
            gram = gram_matrix(c if self.branches == "all" else c[-1:])
            d = gradient_matrix(gram, self.objective, self.kernel_reg)
            e, _ = mixing_matrix(gram, self.strength, None, 1, self.objective, self.kernel_reg)
            length, unit = (np.linalg.norm(x, axis=(1, 2)) for x in (e, d))
            self.scales.extend((length[length > 0] / unit[length > 0]).tolist())
            return push(tokens)

        return push and noted


def paint(pipeline: Pipeline, repulsion: Measured | None, prompts: list[str], seeds: int, images: int) -> dict:
    """Means over all groups of Vendi score and adherence (None where it cannot be read), the η, and pictures."""
    found, pictures = [], []
    for prompt in prompts:
        for seed in range(seeds):
            batch = pipeline(prompt, images, seed=seed, progress=f"{prompt}, seed {seed}", repulsion=repulsion)
            found.append(describe_batch(batch, prompt, pipeline.defaults.world))
            pictures += batch if seed == 0 else []
    kept = [one["adherence"] for one in found if one.get("adherence") is not None]
    return {"vendi": mean(one["vendi"] for one in found), "adherence": mean(kept) if kept else None,
            "scales": repulsion.scales if repulsion else [], "sheet": output.grid(pictures, images)}


def line(name: str, found: dict, base: dict) -> str:
    """One row of the table."""
    kept = "–" if found["adherence"] is None else f"{100 * found['adherence']:.1f} %"
    scales = found["scales"]
    eta = f"{median(scales):.1e} ({min(scales):.0e} … {max(scales):.0e})" if scales else "–"
    return f"| {name} | {found['vendi']:.2f} | {found['vendi'] / base['vendi']:.2f} | {kept} | {eta} |"


def propose(tried: dict[float, dict], base: dict) -> float | None:
    """The strength with the largest Vendi score that keeps the prompt, None where that cannot be told."""
    if base["adherence"] is None:
        return None
    kept = [strength for strength, found in tried.items() if found["adherence"] >= base["adherence"] - KEPT]
    return max(kept, key=lambda strength: tried[strength]["vendi"], default=None)


def run(args: argparse.Namespace) -> None:
    with whole_folder(args.out, overwrite=True, ours=FILES) as claim:
        tune(args, claim.work)


def tune(args: argparse.Namespace, folder: Path) -> None:
    """Prints the table and the proposal; the sheets go to `folder`."""
    if args.images < 2:
        raise ValueError(f"--images must be at least 2, which repel each other, got {args.images}")
    pipeline = Pipeline.load(args.model, dtype=getattr(torch, args.dtype or "", None), offload=args.offload)
    own = pipeline.defaults.repulsion or Repulsion(strength=1.0)
    said = {} if args.blocks is None else {"blocks": args.blocks}
    said |= {} if args.repel_steps is None else {"steps": args.repel_steps, "until": None}
    start = Measured(**vars(replace(own, scale=None, strength=1.0, iterations=1, **said)))
    start.check_blocks(pipeline.config.num_blocks)
    prompts = args.prompts or (CHOICE[::4] if pipeline.defaults.world == "tiny" else PROMPTS)
    base, tried = paint(pipeline, None, prompts, args.seeds, args.images), {}
    print("| strength | Vendi | × base | adherence | η that goes as far: median (range) |\n|" + "---|" * 5)
    print(line("base", base, base), flush=True)
    for strength in STRENGTHS:
        repulsion = replace(start, strength=strength, scales=[])
        tried[strength] = paint(pipeline, repulsion, prompts, args.seeds, args.images)
        print(line(f"{strength}", tried[strength], base), flush=True)
    named = {"base": base, **{f"strength-{s}": found for s, found in tried.items()}}
    for name, found in named.items():
        found.pop("sheet").save(folder / f"{name}.png")
    output.write_summary(folder, {"prompts": prompts, "images": args.images, "found": named})
    best = propose(tried, base)
    if best is None:
        print(f"look at {args.out}: take the strength of the last sheet that still shows what was asked")
    else:
        print(f"proposed: strength {best}, or scale {median(tried[best]['scales']):.1e} (pictures in {args.out})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3", help="a bundled checkpoint, a folder, a file, or a hub's name")
    parser.add_argument("--prompts", nargs="+", help="open ones, which leave much to the model")
    parser.add_argument("--seeds", type=int, default=2, help="groups a prompt (default: %(default)s)")
    parser.add_argument("--images", type=int, default=4, help="pictures in a group (default: %(default)s)")
    parser.add_argument("--blocks", type=blocks, help="all, first, middle, last, or indices such as 0-3,7")
    parser.add_argument("--repel-steps", type=int, help="τ, the first steps, which repel")
    parser.add_argument("--offload", choices=["parts", "blocks"], help="one network in memory at a time; or one block")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored; GPU: bfloat16")
    parser.add_argument("--out", type=Path, default=Path("outputs/tune"), help="folder for pictures, replaced")
    return exit_code(run, parser)


if __name__ == "__main__":
    sys.exit(main())
