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
import os
import sys
from collections import Counter
from math import prod

from tqdm import tqdm

from .detect import Part, inspect_checkpoint
from .files import DTYPES
from .load import open_part, read_stored


def describe(part: Part, family: str | None, check: bool) -> dict[str, object]:
    """One network: location, storage format, size, and why it cannot be loaded, if so."""
    stored = sorted(part.entries.items(), key=lambda item: -item[1].nbytes)  # the largest tensor's dtype first
    dtypes = Counter(f"{entry.dtype} scaled" if entry.scale else entry.dtype for _, entry in stored)
    both = [entry for _, whole in stored for entry in (whole, whole.scale, whole.scale and whole.scale.scale) if entry]
    try:
        problem = open_part(part, family=family) and ""
    except ValueError as error:
        problem = str(error)
    return {
        "in": f"{part.path}{f': {part.prefix}*' if part.prefix else ''}", "layout": part.layout.name,
        "dtype": ", ".join(dtypes if len(dtypes) == 1 else (f"{n} × {dtype}" for dtype, n in dtypes.items())),
        "parameters": sum(prod(entry.shape) for name, entry in stored if not name.endswith("pos_embed")),  # SD3's table
        "bytes": sum(entry.nbytes for entry in both), "problem": problem,
        "passed over": f"{len(part.unused)} stray tensors, first {part.unused[0]}" if part.unused else "",
        "NaN or inf": ", ".join(entry.name for entry in tqdm(both if check else [], part.path.name, disable=not check)
                                if entry.dtype in DTYPES and not read_stored(entry).double().isfinite().all()),
    }


def table(about: dict, home: str) -> str:
    """A headline, one row per network, then tokenizers, what is missing, other files and problems."""
    rows = [("part", "in", "layout", "dtype", "parameters", "size")]
    rows += [(role, part["in"].removeprefix(home), part["layout"], part["dtype"], f"{part['parameters'] / 1e6:,.1f} M",
              f"{part['bytes'] / 1e9:.2f} GB") for role, part in about["parts"].items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    variant = f"{about['variant']} ({about['told']})" if about["told"] else about["variant"] or "part of a pipeline"
    lines = [f"{about['path']}: {variant}", "", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
    for label in ("tokenizers", "missing", "beside"):
        lines += ["", *(f"{label:12}{name}: {what}" for name, what in about[label].items())] if about[label] else []
    for label in ("passed over", "problem", "NaN or inf"):
        lines += [f"{label:12}{role}: {part[label]}" for role, part in about["parts"].items() if part[label]]
    return "\n".join(lines).replace(f" {home}", " ")


def main() -> int:
    """Prints what is there. Exit codes: see above; 130 if interrupted, 141 if the output is a closed pipe."""
    p = argparse.ArgumentParser(prog="python -m weights", epilog=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", metavar="PATH", help="a file, a folder, or a name on the hub")
    p.add_argument("--check", action="store_true", help="read every number, and name the tensors with NaN or infinity")
    p.add_argument("--json", action="store_true", help="print the same as JSON")
    sys.stdout.reconfigure(errors="replace")
    try:
        args = p.parse_args()
        found = inspect_checkpoint(args.path)
        about = {**vars(found), "parts": {role: describe(part, found.family, args.check) for role, part in
                                          found.parts.items()},
                 "beside": {str(place): str(what).removeprefix(f"{place} ") for place, what in found.beside.items()}}
        home = f"{found.path if found.path.is_dir() else found.path.parent}/"
        text = json.dumps(about, indent=2, ensure_ascii=False, default=str) if args.json else table(about, home)
        problem, bad = (any(part[key] for part in about["parts"].values()) for key in ("problem", "NaN or inf"))
        problem |= bool(found.damaged)
        print(text + "\n\nNaN or inf  in no tensor" * (args.check and not bad and not args.json), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 2 if problem else int(bad)


if __name__ == "__main__":
    sys.exit(main())
