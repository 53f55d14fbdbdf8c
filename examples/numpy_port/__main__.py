"""Generate pictures without and with repulsion, as the project does: python -m examples.numpy_port INPUTS OUT."""

import argparse
from pathlib import Path

import numpy as np

from . import safetensors
from .checkpoint import load
from .sampler import paint

parser = argparse.ArgumentParser(prog="python -m examples.numpy_port", description=__doc__)
parser.add_argument("inputs", type=Path, help="token ids and noise: an .npz as in the README, or a kit.safetensors")
parser.add_argument("out", type=Path, help="folder for the pictures")
parser.add_argument("--checkpoint", type=Path, default=Path("weights/checkpoints/tiny-sd3"))
parser.add_argument("--tensors", type=Path, help=".npz file for the intermediate tensors of the batch that repels")
args = parser.parse_args()

parts, settings = load(args.checkpoint)
inputs = dict(np.load(args.inputs)) if args.inputs.suffix == ".npz" else safetensors.read(args.inputs)
args.out.mkdir(parents=True, exist_ok=True)
for batch, repulsion in (("base", None), ("repelled", settings["repulsion"])):
    tensors = paint(parts, inputs, **settings | {"repulsion": repulsion})
    for i, picture in enumerate(tensors["pixels"]):  # PPM, the simplest format of pictures
        (args.out / f"{batch}-{i}.ppm").write_bytes(b"P6 %d %d 255\n" % picture.shape[1::-1] + picture.tobytes())
if args.tensors:
    np.savez(args.tensors, **tensors)
