"""What a checkpoint is, from its headers alone, and what a pipeline still lacks.

It takes no longer for 24 GB than for a small file. PATH is one of

  a file        original, merged with text encoders and autoencoder, or a single network
  a folder      in the hub's layout, one network's of it, or one with original files
  a name        on the hub, such as black-forest-labs/FLUX.1-dev, looked up in the local cache, nothing is downloaded;
                or tiny-sd3, a checkpoint bundled with this repository

examples:
  python -m weights flux1-dev.safetensors
  python -m weights stabilityai/stable-diffusion-3.5-medium --json
  python -m weights sd3_medium_incl_clips_t5xxlfp8.safetensors --check

exit codes: 0; 1 if --check finds NaN or infinity; 2 if PATH is missing, damaged, or a network that cannot be loaded."""

import argparse
import json
import sys
from collections import Counter
from functools import cache, partial
from math import prod
from pathlib import Path

from safetensors import safe_open
from tqdm import tqdm

from .detect import Checkpoint, Part, inspect_checkpoint
from .files import DTYPES
from .load import open_part, read_stored


def relative(place: Path, found: Checkpoint) -> str:
    return str(place).removeprefix(f"{found.path if found.path.is_dir() else found.path.parent}/")


def describe(part: Part, found: Checkpoint) -> dict[str, object]:
    """One network: location, storage format, size, and why it cannot be loaded, if so."""
    stored = sorted(part.entries.items(), key=lambda item: -item[1].nbytes)  # the largest tensor's dtype first
    dtypes = Counter(f"{entry.dtype} scaled" if entry.scale else entry.dtype for _, entry in stored)
    try:
        problem = open_part(part, family=found.family) and ""
    except ValueError as error:
        problem = str(error)
    return {
        "in": f"{relative(part.path, found)}{f': {part.prefix}*' if part.prefix else ''}", "layout": part.layout.name,
        "dtype": ", ".join(dtypes if len(dtypes) == 1 else (f"{n} × {dtype}" for dtype, n in dtypes.items())),
        "parameters": sum(prod(entry.shape) for name, entry in stored if not name.endswith("pos_embed")),  # SD3's table
        "bytes": sum(entry.nbytes for _, whole in stored for entry in (whole, whole.scale) if entry),
        "passed over": part.unused, "problem": problem,
    }


def table(about: dict) -> str:
    """A headline, one row per network, then tokenizers, what is missing, other files and problems."""
    rows = [("part", "in", "layout", "dtype", "parameters", "size")]
    rows += [(role, part["in"], part["layout"], part["dtype"], f"{part['parameters'] / 1e6:,.1f} M",
              f"{part['bytes'] / 1e9:.2f} GB") for role, part in about["parts"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    variant = f"{about['variant']} ({about['told']})" if about["told"] else about["variant"] or "part of a pipeline"
    lines = [f"{about['path']}: {variant}", "", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    for label in ("tokenizers", "missing", "beside"):
        lines += ["", *(f"{label:12}{name}: {what}" for name, what in about[label].items())] if about[label] else []
    for role, part in about["parts"].items():
        over = part["passed over"]
        lines += [f"{'passed over':12}{role}: {len(over)} tensors of no network, first {over[0]}"] if over else []
        lines += [f"{'problem':12}{part['problem']}"] if part["problem"] else []
    if (bad := about["not finite"]) is not None:
        lines += ["", f"{'NaN or inf':12}{', '.join(bad) or 'in no tensor'}"]
    return "\n".join(lines)


def not_finite(found: Checkpoint) -> list[str]:
    """The files and names of the tensors with NaN or infinity. Reads all numbers."""
    entries = [entry for part in found.parts.values() for whole in part.entries.values()
               for entry in (whole, whole.scale) if entry and entry.dtype in DTYPES]
    opened = cache(partial(safe_open, framework="pt"))
    return [f"{entry.file}: {entry.name}" for entry in tqdm(entries, "reading", leave=False)
            if not read_stored(entry, opened).float().isfinite().all()]


def main() -> int:
    """Prints what is there. Exit codes: see above; 130 if interrupted."""
    p = argparse.ArgumentParser(prog="python -m weights", epilog=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", metavar="PATH", help="a file, a folder, or a name on the hub")
    p.add_argument("--check", action="store_true", help="read every number, and name the tensors with NaN or infinity")
    p.add_argument("--json", action="store_true", help="print the same as JSON")
    args = p.parse_args()
    try:
        found = inspect_checkpoint(args.path)
        beside = {relative(place, found): str(what).removeprefix(f"{place} ") for place, what in found.beside.items()}
        about = {**vars(found), "parts": {role: describe(part, found) for role, part in found.parts.items()},
                 "tokenizers": {role: relative(place, found) for role, place in found.tokenizers.items()},
                 "beside": beside, "not finite": not_finite(found) if args.check else None}
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(json.dumps(about, indent=2, ensure_ascii=False, default=str) if args.json else table(about))
    return 2 if any(part["problem"] for part in about["parts"].values()) else bool(about["not finite"])


if __name__ == "__main__":
    sys.exit(main())
