"""`python -m benchmarks.interpolate PROMPT`: from one seed's picture to another's, in contextual and in latent space.

Contextual repulsion, Eq. 5: keep the source's noise and replace its representation h by h_src + α (h_tgt − h_src), α
from below 0 to above 1. In the contextual space the picture changes its meaning and stays sharp, the paper finds; in
latent space it becomes a double exposure.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repulsion import Repulsion
from sampler import Pipeline, output
from sampler.folders import whole_folder
from sampler.methods import Method
from sampler.options import blocks, exit_code
from sampler.report import to_pixels
from sampler.schedule import Velocity, starting_noise
from tiny.world import COLOR_RGB, GROUND_RGB, SHADE

ALPHAS = tuple(i / 4 for i in range(-2, 7))  # −0.5 … 1.5
FILES = r"strip\.png|summary\.json"


def between(h: Tensor, alphas: tuple[float, ...], groups: int = 1) -> Tensor:
    """The first of each group become h_src + α (h_tgt − h_src), the two last are h_src and h_tgt and stay.

    h (groups · (alphas + 2), …) → the same shape; α = 0 and 1 give h_src and h_tgt to the bit.
    """
    *copies, source, target = h.unflatten(0, (groups, len(alphas) + 2)).unbind(1)
    moved = [torch.lerp(source, target, alpha) for alpha, _ in zip(alphas, copies, strict=True)]
    return torch.stack([*moved, source, target], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class ContextInterpolation(Repulsion):
    """Eq. 5 in the contextual space, in the steps and blocks of a `Repulsion`, for alphas + 2 images.

    All samples start from the source's noise but the last, which starts from the target's. h is what a `Repulsion`
    pushes, in a single-stream block the context tokens; h_src and h_tgt are those of the two last samples, which are
    not changed.

    alphas: one for each sample but the two last
    """

    alphas: tuple[float, ...] = ()

    def bind(self, block: int, num_blocks: int, groups: int = 1,
             num_context: int | None = None) -> Callable[[Tensor], Tensor] | None:
        def move(tokens: Tensor) -> Tensor:
            return torch.cat([between(tokens[:, :num_context], self.alphas, groups), tokens[:, num_context:]], dim=1)

        if not self.acts_in(block, num_blocks):
            return None
        return move if num_context is not None else partial(between, alphas=self.alphas, groups=groups)


@dataclass(frozen=True, kw_only=True)
class LatentInterpolation(Method):
    """Eq. 5 in latent space, for alphas + 2 images that start from `between` of both noises.

    In the first `steps` the samples follow `between` of both velocities, and so stay on the line between both latents.
    """

    alphas: tuple[float, ...]
    steps: int

    def velocity(self, velocity: Velocity, sigmas: Tensor) -> Velocity:
        def on_the_line(x: Tensor, sigma: float, step: int) -> Tensor:
            v = velocity(x, sigma, step)
            return between(v, self.alphas) if step < self.steps else v

        return on_the_line


def interpolate(pipeline: Pipeline, prompt: str, source_seed: int, target_seed: int, alphas: tuple[float, ...],
                where: Repulsion, steps: int | None = None, progress: bool = False) -> dict[str, list[Image.Image]]:
    """A row of pictures, one for each α, through either space, both changed in the same denoising steps.

    Both rows have the same alphas and start from the noises of the same two seeds. `progress` draws a bar for each.
    """
    size = pipeline.defaults.height // pipeline.downscale, pipeline.defaults.width // pipeline.downscale
    source, target = (starting_noise(seed, 1, (pipeline.config.latent_channels, *size))
                      for seed in (source_seed, target_seed))
    noise = torch.cat([source.expand(len(alphas) + 1, -1, -1, -1), target])
    count, line = len(noise), LatentInterpolation(alphas=alphas, steps=where.steps)
    ways = {"contextual space": {"noise": noise, "repulsion": ContextInterpolation(**vars(where), alphas=alphas)},
            "latent space": {"noise": between(noise, alphas), "method": line}}
    return {name: pipeline(prompt, count, steps=steps, **way, progress=name if progress else None)[:-2]
            for name, way in ways.items()}


def blur(pictures: list[Image.Image]) -> list[float]:
    """Distance of a pixel to the nearest color of the tiny world, mean over each picture, in levels of 0 to 255.

    The world's colors are those of its things and, of each ground, the plain one and its two shades. Its renderer mixes
    colors at outlines alone; a double exposure, or a picture out of focus, mixes them everywhere.
    """
    shades = (GROUND_RGB[:, None] + torch.tensor([-SHADE, 0, SHADE])[:, None]).clamp(0, 1).flatten(0, 1)
    pixels = (to_pixels(pictures) + 1).flatten(2).mT * 127.5
    return torch.cdist(pixels, 255 * torch.cat([COLOR_RGB, shades])).amin(-1).mean(-1).tolist()


def strip(rows: dict[str, list[Image.Image]], alphas: tuple[float, ...], title: str) -> Image.Image:
    """The rows below each other, labeled with their names and the alphas."""
    sheet = output.grid([picture for row in rows.values() for picture in row], columns=len(alphas))
    size = max(15, sheet.height // 20)
    font, margin, top = ImageFont.load_default(size), 10 * size, 4 * size
    picture = Image.new("RGB", (margin + sheet.width, top + sheet.height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((output.GAP, output.GAP), output.fit(title, font, picture.width - 16), fill="black", font=font)
    picture.paste(sheet, (margin, top))
    width, height = (sheet.width - output.GAP) / len(alphas), (sheet.height - output.GAP) / len(rows)
    for i, alpha in enumerate(alphas):
        place = margin + output.GAP / 2 + (i + 0.5) * width, top
        draw.text(place, f"{alpha:g}", fill=(90, 90, 90), font=font, anchor="mb")
    for i, name in enumerate(rows):
        place = margin - output.GAP, top + output.GAP / 2 + (i + 0.5) * height
        draw.text(place, name, fill=(90, 90, 90), font=font, anchor="rm")
    return picture


def table(rows: dict[str, list[float]], alphas: tuple[float, ...]) -> str:
    """The blur of each picture as lines of text, and its mean where 0 < α < 1 and where α < 0 or α > 1."""
    inside, outside = [0 < a < 1 for a in alphas], [not 0 <= a <= 1 for a in alphas]
    lines = ["blur".ljust(18) + "".join(f"{alpha:7g}" for alpha in alphas) + "  between   beyond"]
    for name, values in rows.items():
        means = [sum(v for v, counts in zip(values, which, strict=True) if counts) / max(1, sum(which))
                 for which in (inside, outside)]
        lines.append(name.ljust(18) + "".join(f"{v:7.2f}" for v in values) + f"{means[0]:9.2f}{means[1]:9.2f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.interpolate", description=__doc__.partition("\n")[0])
    p.add_argument("prompt", help="what the pictures should show")
    p.add_argument("--source-seed", type=int, default=0, metavar="A", help="whose noise is kept (default: 0)")
    p.add_argument("--target-seed", type=int, default=1, metavar="B", help="whose picture is led to (default: 1)")
    p.add_argument("--model", metavar="PATH", help="as of python -m sampler (default: tiny-sd3)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--first", type=int, metavar="N", help="interpolate in that many of the first steps (default: all)")
    p.add_argument("--blocks", type=blocks, default="all", help="all, first, middle, last (thirds), or indices")
    p.add_argument("--out", type=Path, help="folder for the files (default: outputs/interpolate-<prompt>)")
    p.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return p


def run(args: argparse.Namespace) -> None:
    target = args.out or Path("outputs") / f"interpolate-{output.folder_name(args.prompt)}"
    with whole_folder(target, args.overwrite, numbered=args.out is None, ours=FILES) as claim:
        blurs = paint(args, claim.work)
    if blurs is not None:
        print(table(blurs, ALPHAS))
    print(f"written to {claim.target}")


def paint(args: argparse.Namespace, folder: Path) -> dict[str, list[float]] | None:
    """The strip of pictures and the numbers, to `folder`; in the tiny world returns the blur of each picture."""
    pipeline = Pipeline.load(args.model)
    steps = pipeline.defaults.steps if args.steps is None else args.steps
    where = Repulsion(0.0, steps=steps if args.first is None else args.first, blocks=args.blocks)
    rows = interpolate(pipeline, args.prompt, args.source_seed, args.target_seed, ALPHAS, where, steps, progress=True)
    about = {"prompt": args.prompt, "model": args.model or "tiny-sd3", "source_seed": args.source_seed,
             "target_seed": args.target_seed, "alphas": ALPHAS, "steps": steps, "first": where.steps,
             "blocks": where.blocks}
    blurs = {name: blur(row) for name, row in rows.items()} if pipeline.defaults.world == "tiny" else None
    title = f"“{args.prompt}”, from seed {args.source_seed} at 0 to seed {args.target_seed} at 1"
    output.save_png(strip(rows, ALPHAS, title), folder / "strip.png", about)
    output.write_summary(folder, {**about, "blur": blurs})
    return blurs


def main() -> int:
    """The exit code, see `exit_code`."""
    return exit_code(run, parser())


if __name__ == "__main__":
    sys.exit(main())
