"""Reference tensors for a port of this program to another language or library: write records a run from prompts to
pictures as a kit, check compares a port's tensors with it and reports the first deviation."""

import argparse
import sys
from pathlib import Path

from sampler.options import exit_code

from . import files
from .check import compare, report
from .kit import PROMPTS, ROUNDING, Kit, write

GIVEN = {**dict.fromkeys(("steps", "seed", "height", "width", "iterations"), int), "guidance": float, "strength": float}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m porting", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    w = commands.add_parser("write", help="write kit.safetensors, manifest.json and PORTING.md; start with the last")
    w.add_argument("out", type=Path, help="folder for them")
    w.add_argument("--model", default="tiny-sd3", metavar="PATH", help="as of python -m sampler (default: %(default)s)")
    w.add_argument("--prompt", nargs="+", default=PROMPTS, help="one or several (default: %(default)s)")
    w.add_argument("--images", type=int, default=2, help="of each prompt (default: %(default)s)")
    for name, kind in GIVEN.items():
        w.add_argument(f"--{name}", type=kind, help="as of python -m sampler (default: the checkpoint's)")
    w.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    c = commands.add_parser("check", help="compare a port's tensors; exit code 0: all pass, 1: not, 2: error")
    c.add_argument("kit", type=Path, help="the folder of a kit")
    c.add_argument("theirs", type=Path, help="a .safetensors or .npz file with the kit's tensors by name")
    c.add_argument("--fed", action="store_true", help="each tensor was computed from the kit's inputs, not your own")
    c.add_argument("--partial", action="store_true", help="tensors may be missing")
    c.add_argument("--dtype", choices=[*ROUNDING], default="float32", help="of your networks (default: %(default)s)")
    return p


def run(args: argparse.Namespace) -> None:
    if args.command == "write":
        rows = write(args.out, args.model, args.prompt, args.images, overwrite=args.overwrite,
                     **{name: getattr(args, name) for name in GIVEN})
        return print(f"written to {args.out}: {len(rows)} tensors; start with PORTING.md")
    kit, theirs = Kit.read(args.kit), files.read(args.theirs)
    rows = compare(kit, theirs, args.fed, args.dtype)
    print(report(rows, args.fed))
    if unknown := [name for name in theirs if name not in kit.tensors]:
        print(f"{len(unknown)} tensors of {args.theirs.name} are not in the kit, such as {unknown[0]}")
    if any(row.passed is False or row.passed is None and not args.partial for row in rows):
        sys.exit(1)


def main() -> int:
    return exit_code(run, parser())


if __name__ == "__main__":
    sys.exit(main())
