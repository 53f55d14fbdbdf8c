"""`python -m porting write OUT` and `python -m porting check KIT THEIRS`."""

import argparse
import sys
from pathlib import Path

from sampler.options import exit_code

from . import files
from .check import compare, report
from .kit import Kit, write

DESCRIPTION = """\
Reference tensors for a port of this program to another language or library: write records a run from prompt to
pictures as a kit, check compares a port's tensors with it and reports the first deviation."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m porting", description=DESCRIPTION,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    w = commands.add_parser("write", help="write kit.safetensors, manifest.json and PORTING.md; start with the last")
    w.add_argument("out", type=Path, help="folder for them")
    w.add_argument("--model", default="tiny-sd3", metavar="PATH", help="as of python -m sampler (default: %(default)s)")
    w.add_argument("--prompt", default="a circle", help="(default: %(default)s)")
    w.add_argument("--images", type=int, default=2, help="samples, which repel each other (default: %(default)s)")
    w.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    w.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    c = commands.add_parser("check", help="compare a port's tensors; exit code 0: all pass, 1: some deviate, 2: error")
    c.add_argument("kit", type=Path, help="the folder of a kit")
    c.add_argument("theirs", type=Path, help="a .safetensors or .npz file with any of the kit's tensors by name")
    return p


def run(args: argparse.Namespace) -> None:
    if args.command == "write":
        rows = write(args.out, args.model, args.prompt, args.images, args.steps, args.overwrite)
        size = (args.out / "kit.safetensors").stat().st_size / 1e6
        print(f"written to {args.out}: {len(rows)} tensors, {size:.1f} MB; start with PORTING.md")
        return
    kit, theirs = Kit.read(args.kit), files.read(args.theirs)
    rows = compare(kit, theirs)
    print(report(rows))
    if unknown := [name for name in theirs if name not in kit.tensors]:
        print(f"{len(unknown)} tensors of {args.theirs.name} are not in the kit, such as {unknown[0]}")
    if any(row.passed is False for row in rows):
        sys.exit(1)


def main() -> int:
    """The exit code, see `exit_code`; 1 where a port deviates."""
    return exit_code(run, parser())


if __name__ == "__main__":
    sys.exit(main())
