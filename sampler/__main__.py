"""`python -m sampler PROMPT`: the same seeds twice, a typical batch and one whose samples repel each other."""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from . import output, report
from .options import exit_code, method, name_of, parser, settings, skip_layer_guidance
from .pipeline import Pipeline


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline of --model and what is given beside it."""
    tokenizers = args.tokenizers and (args.tokenizers if len(args.tokenizers) > 1 else args.tokenizers[0])
    return Pipeline.load(
        args.model, dtype=getattr(torch, args.dtype or "", None), device=args.device, offload=args.offload,
        keep_float8=args.keep_float8, transformer=args.transformer, autoencoder=args.autoencoder,
        text_encoders=args.text_encoders, tokenizers=tokenizers,
    )


def open_picture(file: Path) -> Image.Image:
    """The picture in a file. Raises ValueError naming the file."""
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
    skip, other = skip_layer_guidance(args), method(args)
    pipeline = load(args)
    repulsion = settings(args, pipeline.defaults.repulsion)
    if repulsion is not None:
        repulsion.check_blocks(pipeline.config.num_blocks)
    call = {"steps": args.steps, "guidance": args.guidance, "true_guidance": args.true_guidance,
            "negative_prompt": args.negative, "height": args.height, "width": args.width, "seed": args.seed,
            "skip_layer_guidance": skip}

    diverse = "repelled" if args.method == "repulsion" else args.method
    batches = {} if args.no_compare else {"base": {}}
    batches[diverse] = {"repulsion": repulsion, "method": other}
    pictures, found = {}, {}
    for name, ways in batches.items():
        start = time.perf_counter()
        pictures[name] = pipeline(args.prompt, args.images, **call, image=image, **ways, progress=name)
        seconds = round(time.perf_counter() - start, 3)
        found[name] = report.describe_batch(pictures[name], args.prompt, pipeline.defaults.world) | {"seconds": seconds}

    width, height = pictures[diverse][0].size
    about = {"model": name_of(args), "prompt": args.prompt, "images": args.images,
             **{k: v if v is not None else getattr(pipeline.defaults, k, None) for k, v in call.items()},
             "height": height, "width": width, "image": args.image and str(args.image),
             "skip_layer_guidance": None if skip is None else asdict(skip)}
    ways = {"repulsion": None if repulsion is None else asdict(repulsion),
            "method": None if other is None else {"name": args.method, **asdict(other)}}
    target = args.out or output.free_folder(Path("outputs") / output.folder_name(args.prompt))
    with output.whole_folder(target, args.overwrite) as folder:
        write(folder, pictures=pictures, found=found, about=about, ways=ways)
    print(report.table(found.get("base"), found[diverse], args.images).replace("repelled", diverse, 1))
    print(f"written to {target}{'' if args.no_compare else ': compare.png shows both'}")


def write(folder: Path, pictures: dict, found: dict, about: dict, ways: dict) -> None:
    """Single pictures, a grid of each batch, both grids side by side, and the numbers."""
    how = [ways["method"]["name"]] if ways["method"] else []
    how += ["contextual repulsion"] if ways["repulsion"] else []
    sheets = []
    for name, batch in pictures.items():
        made = {**about, **(dict.fromkeys(ways) if name == "base" else ways)}
        for i, picture in enumerate(batch):
            output.save_png(picture, folder / f"{name}-{i:02d}.png", {**made, "index": i})
        sheet = output.grid(batch)
        output.save_png(sheet, folder / f"{name}.png", made)
        label = "typical" if name == "base" else f"with {' and '.join(how)}"
        sheets.append((f"{label}: Vendi score {found[name]['vendi']:.2f}", sheet))
    if len(sheets) == 2:
        output.save_png(output.side_by_side(sheets, about["prompt"]), folder / "compare.png", {**about, **ways})
    output.write_summary(folder, {**about, **ways, "batches": found})


def main() -> int:
    """The exit code, see `exit_code`."""
    return exit_code(run, parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
