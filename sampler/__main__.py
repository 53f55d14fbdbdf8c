"""`python -m sampler PROMPT`: the same seeds twice, a typical batch and one whose samples repel each other."""

import argparse
import json
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from repulsion import Repulsion

from . import output, report
from .guidance import SkipLayerGuidance
from .pipeline import Pipeline

EPILOG = """\
How it works: inside every joint attention of the model the text tokens of each sample have read from that sample's
image. In the first --repel-steps denoising steps they are pushed apart, by --scale and in --iterations small steps,
along the gradient of the batch's entropy. The prompt stays what it is; the pictures start to differ.

examples:
  python -m sampler "a circle"
  python -m sampler "a star and a square" --images 4 --seed 7 --diversity 0.2
  python -m sampler "a small green ring on the left" --blocks middle --site block
  python -m sampler "a cat" --model path/to/stable-diffusion-3.5-large --images 4
  python -m sampler "make it winter" --model path/to/FLUX.1-Kontext-dev --image garden.jpg --images 4

The pictures, base.png, repelled.png, compare.png and summary.json go to outputs/<prompt>, or to --out.
Too alike? Raise --diversity. No longer what the prompt says? Lower it, or repel in fewer steps or blocks."""


def blocks(text: str) -> str | tuple[int, ...]:
    """ "all", "first", "middle", "last", or indices as in 0-3,7."""
    return text if text in ("all", "first", "middle", "last") else indices(text, "all, first, middle, last or ")


def indices(text: str, other: str = "") -> tuple[int, ...]:
    """Indices as in 0-3,7."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {other}a list such as 0-3,7")
    ranges = [[int(n) for n in part.split("-")] for part in text.split(",")]
    return tuple(i for r in ranges for i in range(r[0], r[-1] + 1))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m sampler", description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompt", help="what the pictures should show")
    p.add_argument("--model", metavar="PATH", help="an embedded checkpoint, a folder (the hub's or of original "
                   "files), an original or merged file, or a name on the hub (default: tiny-sd3)")
    p.add_argument("--images", type=int, default=8, help="pictures in the batch (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="picture i depends on it and i alone (default: %(default)s)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--guidance", type=float, help="how strongly the prompt rules (default: the checkpoint's)")
    p.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from (default: nothing)")
    p.add_argument("--height", type=int, help="pixels (default: the checkpoint's; with --image about that picture's)")
    p.add_argument("--width", type=int, help="pixels (likewise)")
    p.add_argument("--image", type=Path, metavar="FILE", help="the picture to edit (FLUX.1-Kontext)")
    p.add_argument("--true-guidance", type=float, metavar="W",
                   help="FLUX.1: lead away from --negative this strongly, in twice the time")
    p.add_argument("--skip-layers", type=indices, metavar="LIST",
                   help="SD3.5-medium: lead away from what it paints without these blocks, usually 7-9")
    p.add_argument("--skip-scale", type=float, metavar="S", help="how strongly (default: 2.8)")
    r = p.add_argument_group("repulsion (defaults: the checkpoint's)")
    r.add_argument("--diversity", type=float, metavar="D", help="how much more diverse each push makes the tokens: the "
                   "share, 0 to 1, of what their entropy lacks to its highest")
    r.add_argument("--scale", type=float, help="η, instead: the strength of the push; its unit differs between models")
    r.add_argument("--iterations", type=int, help="M, the small steps that one push is made of")
    r.add_argument("--repel-steps", type=int, help="τ: repel in that many of the first denoising steps")
    r.add_argument("--blocks", type=blocks, help="all, first, middle, last (thirds), or indices such as 0-3,7")
    r.add_argument("--site", choices=["attention", "block"], help="push what the attention or what the block returns")
    r.add_argument("--tokens", choices=["context", "image"], help="what is pushed: text tokens, or image tokens")
    m = p.add_argument_group("where --model does not hold everything, or memory is short")
    m.add_argument("--transformer", metavar="PATH", help="a file or folder, instead of --model's")
    m.add_argument("--autoencoder", metavar="PATH", help="likewise, such as ae.safetensors")
    m.add_argument("--text-encoders", metavar="PATH", nargs="+", help="likewise, such as clip_l.safetensors and t5xxl…")
    m.add_argument("--tokenizers", metavar="PATH", nargs="+",
                   help="the folder that holds tokenizer, tokenizer_2, …, or a path for each text encoder")
    m.add_argument("--offload", choices=["parts", "blocks"], help="one network in memory at a time; moreover, the "
                   "transformer's blocks visit the GPU one by one")
    m.add_argument("--keep-float8", action="store_true", help="keep matrices stored in float8 so, in half the memory")
    o = p.add_argument_group("output")
    o.add_argument("--out", type=Path, help="folder for the files (default: outputs/<prompt>, numbered if taken)")
    o.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    o.add_argument("--no-compare", action="store_true", help="the repelled batch alone, in half the time")
    o.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32, on a GPU bfloat16)")
    o.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    return p


def settings(args: argparse.Namespace, default: Repulsion | None) -> Repulsion:
    """The checkpoint's repulsion, with what the command line says instead."""
    said = {"scale": args.scale, "iterations": args.iterations, "steps": args.repel_steps, "blocks": args.blocks,
            "site": args.site, "tokens": args.tokens}
    said = {name: value for name, value in said.items() if value is not None}
    if args.diversity is not None:
        said |= {"scale": args.scale, "diversity": args.diversity}
    if default is None:
        if args.scale is None and args.diversity is None:
            raise ValueError(f"{name_of(args)} has no default repulsion: say --diversity, for example 0.1")
        return Repulsion(**said)
    if args.scale is not None:
        said["diversity"] = args.diversity
    return replace(default, **said)


def name_of(args: argparse.Namespace) -> str:
    return args.model or args.transformer or "tiny-sd3"


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline of --model and what is given beside it."""
    tokenizers = args.tokenizers
    if tokenizers is not None and len(tokenizers) == 1:
        (tokenizers,) = tokenizers
    return Pipeline.load(
        args.model, dtype=getattr(torch, args.dtype or "", None), device=args.device, transformer=args.transformer,
        autoencoder=args.autoencoder, text_encoders=args.text_encoders, tokenizers=tokenizers, offload=args.offload,
        keep_float8=args.keep_float8,
    )


def skip_layer_guidance(args: argparse.Namespace) -> SkipLayerGuidance | None:
    """What --skip-layers and --skip-scale ask for."""
    if args.skip_layers is None:
        if args.skip_scale is not None:
            raise ValueError("--skip-scale needs --skip-layers, for example 7-9")
        return None
    scale = {} if args.skip_scale is None else {"scale": args.skip_scale}
    return SkipLayerGuidance(args.skip_layers, **scale)


def open_picture(file: Path) -> Image.Image:
    """The picture in a file. Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"--image {file}: there is no such file")
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {file} is no picture that can be read ({error}): give a PNG or JPEG") from error
    return picture


def run(args: argparse.Namespace) -> None:
    if args.out is not None:
        output.refuse_existing(args.out, args.overwrite)  # before anything is painted
    image = None if args.image is None else open_picture(args.image)
    skip = skip_layer_guidance(args)
    pipeline = load(args)
    repulsion = settings(args, pipeline.defaults.repulsion)
    repulsion.check_blocks(pipeline.config.num_blocks)
    call = {"steps": args.steps, "guidance": args.guidance, "true_guidance": args.true_guidance,
            "negative_prompt": args.negative, "height": args.height, "width": args.width, "seed": args.seed}

    batches = {} if args.no_compare else {"base": None}
    batches["repelled"] = repulsion
    pictures, found = {}, {}
    for name, push in batches.items():
        start = time.perf_counter()
        pictures[name] = pipeline(args.prompt, args.images, **call, image=image, skip_layer_guidance=skip,
                                  repulsion=push, progress=name)
        seconds = time.perf_counter() - start
        found[name] = report.describe_batch(pictures[name], args.prompt, pipeline.defaults.world)
        found[name]["seconds"] = round(seconds, 3)

    width, height = pictures["repelled"][0].size
    about = {"model": name_of(args), "prompt": args.prompt, "images": args.images,
             **{k: v if v is not None else getattr(pipeline.defaults, k, None) for k, v in call.items()},
             "height": height, "width": width, "image": None if image is None else str(args.image),
             "skip_layer_guidance": None if skip is None else asdict(skip)}
    summary = {**about, "repulsion": asdict(repulsion), "batches": found}
    slug = re.sub(r"[^a-z0-9]+", "-", args.prompt.lower()).strip("-")[:60] or "prompt"
    target = args.out or output.free_folder(Path("outputs") / slug)
    with output.whole_folder(target, args.overwrite) as folder:
        write(folder, pictures, about, summary)
    print(report.table(found.get("base"), found["repelled"], args.images))
    print(f"written to {target}{'' if args.no_compare else ': compare.png shows both'}")


def write(folder: Path, pictures: dict, about: dict, summary: dict) -> None:
    """Single pictures, a grid of each batch, both grids side by side, and the numbers."""
    sheets = []
    for name, batch in pictures.items():
        repulsion = summary["repulsion"] if name == "repelled" else None
        for i, picture in enumerate(batch):
            output.save_png(picture, folder / f"{name}-{i:02d}.png", {**about, "index": i, "repulsion": repulsion})
        sheet = output.grid(batch)
        output.save_png(sheet, folder / f"{name}.png", {**about, "repulsion": repulsion})
        label = "typical" if name == "base" else "with contextual repulsion"
        sheets.append((f"{label}: Vendi score {summary['batches'][name]['vendi']:.2f}", sheet))
    if len(sheets) == 2:
        compare = output.side_by_side(sheets, about["prompt"])
        output.save_png(compare, folder / "compare.png", {**about, "repulsion": summary["repulsion"]})
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Exit codes: 0; 2 for a call that cannot be right, with one line that says why; 130 if interrupted."""
    args = parser().parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
