"""Paint pictures with repulsion: python -m examples.jax_port OUT --prompt "a circle" --images 4. See README.md."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.flax import load_file, save_file

from .sampler import load, paint
from .text import tokenize

parser = argparse.ArgumentParser(prog="python -m examples.jax_port", description=__doc__)
parser.add_argument("out", type=Path, help="folder for the pictures; or, with --kit, file for the tensors")
parser.add_argument("--checkpoint", type=Path, default=Path("weights/checkpoints/tiny-flux"))
parser.add_argument("--prompt", nargs="+", default=["a circle"])
parser.add_argument("--images", type=int, default=4, help="of each prompt")
parser.add_argument("--seed", type=int, default=0, help="of numpy's noise")
parser.add_argument("--strength", type=float, help="of the repulsion (default: the checkpoint's); 0: none")
parser.add_argument("--kit", type=Path, help="a kit.safetensors: compute its tensors from its prompts and noise")
parser.add_argument("--fed", action="store_true", help="each from the kit's own inputs")
args = parser.parse_args()

weights, settings = load(args.checkpoint)
if args.strength is not None:
    settings["repulsion"] = replace(settings["repulsion"], strength=args.strength) if args.strength else None
if args.kit:
    kit = load_file(args.kit)
    settings["steps"] = len(kit["sigmas"]) - 1
    inputs = {name: kit[name] for name in ("clip_l.ids", "t5.ids", "noise")}
    save_file(paint(weights, inputs, kit=kit if args.fed else None, checked=True, **settings), args.out)
else:
    c, side = settings["configs"]["transformer"]["in_channels"] // 4, settings["configs"]["transformer"]["sample_size"]
    shape = len(args.prompt) * args.images, c, side, side
    noise = np.random.default_rng(args.seed).standard_normal(shape, dtype=np.float32)
    pixels = paint(weights, tokenize(args.checkpoint, args.prompt) | {"noise": noise}, **settings)["pixels"]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(np.asarray(pixels)):
        Image.fromarray(picture).save(args.out / f"{i}.png")
