"""`python -m weights PATH`: what a checkpoint is, from its headers alone, and what a pipeline still lacks."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from .inspection import Component, Inspection, inspect_checkpoint

EPILOG = """\
Only the headers are read, so it takes no longer for 24 GB than for a small file. PATH is one of

  a file        original, merged with text encoders and autoencoder, or a single component
  a folder      in the hub's layout, one component of it, or one with original files
  a name        on the hub, such as black-forest-labs/FLUX.1-dev, looked up in the local cache, nothing is downloaded;
                or tiny-sd3, a checkpoint bundled with this repository

examples:
  python -m weights flux1-dev.safetensors
  python -m weights path/to/stable-diffusion-3.5-large
  python -m weights stabilityai/stable-diffusion-3.5-medium --json
  python -m weights sd3_medium_incl_clips_t5xxlfp8.safetensors --check

exit codes: 0; 1 if --check finds NaN or infinity; 2 if PATH is missing, damaged, or no such model."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m weights", description=__doc__, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", metavar="PATH", help="a file, a folder, or a name on the hub")
    p.add_argument("--check", action="store_true", help="read every number, and name the tensors with NaN or infinity")
    p.add_argument("--json", action="store_true", help="print the same as JSON")
    return p


def table(found: Inspection) -> str:
    """A headline, one row per component, then tokenizers, scheduler, other files and what is missing."""
    kind = f"{found.family}, {found.variant or 'without its transformer'}" if found.family else "part of a pipeline"
    lines = [f"{found.path}: {kind.replace('of its own', 'sizes of its own')}", "", *rows(found.components)]
    tokenizers = ", ".join(f"{where} ({kind})" for where, kind in found.tokenizers.items())
    notes = [("tokenizers", tokenizers)] if tokenizers else []
    notes += [("scheduler", found.scheduler)] if found.scheduler else []
    notes += [("also here", f"{file} {what}") for file, what in found.beside.items()]
    notes += [("missing", f"{name:12} {public}") for name, public in found.missing.items()]
    notes += [("optional", f"{name:12} {public}") for name, public in found.optional.items()]
    if found.family and not found.missing:
        notes.append(("missing", "nothing"))
    if found.not_finite is not None:
        bad = found.not_finite
        several = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        where = f"in {len(bad):,} {'tensor' if len(bad) == 1 else 'tensors'}: {', '.join(bad[:5])}{several}"
        notes.append(("NaN or inf", where if bad else "in no tensor"))
    lines += [""] * bool(notes)
    for i, (label, text) in enumerate(notes):
        again = i and notes[i - 1][0] == label
        lines.append(f"{'' if again else label:12}{text}")
    return "\n".join(lines)


def rows(components: tuple[Component, ...]) -> Iterator[str]:
    """The table of components, with right-aligned numbers."""
    in_one_file = len({c.where for c in components}) == 1 < len(components)
    cells = [("component", "names" if in_one_file else "where", "layout", "dtype", "parameters", "size")]
    for c in components:
        where = f"{c.prefix}*" if in_one_file and c.prefix else "no prefix" if in_one_file else c.where
        shards = f" in {c.files} shards" if c.files > 1 else ""
        dtypes = [f"{n} × {dtype}" if len(c.dtypes) > 1 else dtype for dtype, n in c.dtypes.items()]
        cells.append((c.role, where, c.layout + shards, ", ".join(dtypes), short(c.parameters),
                      short(c.bytes, "B")))
    if len(components) > 1:
        cells.append(("together", "", "", "", short(sum(c.parameters for c in components)),
                      short(sum(c.bytes for c in components), "B")))
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    for row in cells:
        left = (cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False))
        right = (cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True))
        yield "  ".join((*left, *right))


def short(n: int, unit: str = "") -> str:
    """11.90 B parameters, 83.82 M; 23.80 GB."""
    for size, number, of_bytes in ((10**9, "B", "G"), (10**6, "M", "M"), (10**3, "k", "k")):
        if n >= size:
            return f"{n / size:.2f} {of_bytes if unit else number}{unit}"
    return f"{n} {unit}".strip()


def main() -> int:
    """Prints what is there. Exit codes: see EPILOG; 130 if interrupted."""
    args = parser().parse_args()
    try:
        found = inspect_checkpoint(args.path, check_numbers=args.check, progress="reading" if args.check else None)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(json.dumps(asdict(found), indent=2, ensure_ascii=False) if args.json else table(found))
    return 1 if found.not_finite else 0


if __name__ == "__main__":
    sys.exit(main())
