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
parser.add_argument("out", type=Path, help="folder for the pictures; with --kit the file for the tensors")
parser.add_argument("--checkpoint", type=Path, default=Path("weights/checkpoints/tiny-flux"))
parser.add_argument("--prompt", nargs="+", default=["a circle"])
parser.add_argument("--images", type=int, default=4, help="of each prompt")
parser.add_argument("--strength", type=float, help="of the repulsion (default: the checkpoint's)")
parser.add_argument("--kit", type=Path, help="a kit.safetensors: compute its tensors from its ids and noise")
parser.add_argument("--fed", action="store_true", help="and each from the kit's own inputs")
args = parser.parse_args()

weights, settings = load(args.checkpoint)
if args.strength is not None:
    settings["repulsion"] = replace(settings["repulsion"], strength=args.strength, scale=None)
if args.kit:
    kit = load_file(args.kit)
    settings["steps"] = len(kit["sigmas"]) - 1
    save_file(paint(weights, kit, kit if args.fed else {}, checked=True, **settings), args.out)
else:
    ids = tokenize(args.checkpoint, args.prompt)
    noise = np.random.default_rng(0).standard_normal((len(args.prompt) * args.images, 16, 16, 16), np.float32)
    pixels = paint(weights, ids | {"noise": noise}, {}, **settings)["pixels"]
    args.out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(np.asarray(pixels)):
        Image.fromarray(picture).save(args.out / f"{i}.png")
