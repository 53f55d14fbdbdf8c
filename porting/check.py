"""`compare` and `report`: a port's tensors against the kit's, stage by stage."""

from contextlib import suppress
from itertools import groupby, permutations
from typing import NamedTuple

from torch import Tensor

from .evaluate import Weights, edits, find
from .kit import Kit, deviation
from .stages import Entry, networks


class Row(NamedTuple):
    """The result for one tensor, and the mistake that reproduces the port's tensor from the kit's: "" if none of those
    that were tried does, None if none was tried."""

    entry: Entry
    passed: bool | None  # None: it is missing
    said: str
    cause: str | None = None


def compare(kit: Kit, theirs: dict[str, Tensor], fed: bool = False, dtype: str = "float32") -> list[Row]:
    """A row for each tensor of the kit, with the tolerances of a whole run in that dtype, or of tensors that were each
    computed from the kit's own inputs (`fed`). Raises ValueError where the port has none of them."""
    if not kit.tensors.keys() & theirs.keys():
        first = next(iter(theirs), "no tensor at all")
        raise ValueError(f"none of the kit's tensors is there, the first is {first}: name tensors as in manifest.json")
    rows, weights, wrong = [], Weights({}), set()
    for about in kit.rows:
        entry, wanted, found = kit.entry(about), kit.tensors[about["name"]], theirs.get(about["name"])
        tolerance = about["tolerance"][dtype]["fed" if fed else "whole"]
        if found is None:
            rows.append(Row(entry, None, "missing"))
        elif found.shape != wanted.shape:
            rows.append(Row(entry, False, other_shape(found, wanted, tolerance)))
        elif not found.isfinite().all():
            rows.append(Row(entry, False, f"NaN or infinity in {(~found.isfinite()).sum()} of {found.numel()} numbers"))
        else:
            off, cause = deviation(found, wanted), None
            if off > tolerance:
                with suppress(OSError, ValueError):  # without the checkpoint, mistakes in formulas alone are found
                    weights = weights if weights.networks else Weights(networks(kit.run["model"]))
                if fed or not wrong & {*entry.inputs.values()}:  # else it follows from its inputs' deviations
                    cause = find(entry, kit.tensors, weights, found.double()) or ""
                wrong.add(entry.name)
            rows.append(Row(entry, off <= tolerance, f"{off:.1e} of {tolerance:.1e}", cause))
    return rows


def other_shape(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    """Both shapes, and the transposition that would fit, preferably one that makes the values fit as well."""
    said = f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    if sorted(found.shape) != sorted(wanted.shape):
        return said
    fits = [axes for axes in permutations(range(found.ndim)) if found.permute(axes).shape == wanted.shape]
    nearest = min(fits, key=lambda axes: deviation(found.permute(axes), wanted))
    right = deviation(found.permute(nearest), wanted) <= tolerance
    return f"{said}: transposed by {nearest} the shape fits, the values {'fit too' if right else 'do not'}"


def report(rows: list[Row], fed: bool = False) -> str:
    """The table, a line a stage for all missing tensors; then the first deviation and its cause or usual causes."""
    width, lines = max(len(row.entry.name) for row in rows), []
    for stage, group in groupby(rows, key=lambda row: row.entry.stage):
        group = list(group)
        absent = [row.entry.name for row in group if row.passed is None]
        lines.append(f"{stage}:" + (f" not in your file: {', '.join(absent)}" if absent else ""))
        lines += [f"  {row.entry.name:{width}}  {'ok' if row.passed else 'DEVIATES':8}  {row.said}" for row in group
                  if row.passed is not None]
    wrong, absent = ([row for row in rows if row.passed is kind] for kind in (False, None))
    lines.append(f"\n{len(rows) - len(wrong) - len(absent)} of {len(rows)} tensors pass, {len(wrong)} deviate, "
                 f"{len(absent)} are missing (“a of b”: the deviation and its tolerance, both relative, for whole "
                 "numbers absolute)")
    if wrong:
        first, missing = wrong[0].entry, {row.entry.name for row in absent}
        lines += [f"first deviation: {first.name}, in stage {first.stage}: {wrong[0].said}",
                  f"  {'formula: ' + first.formula if first.formula else first.words}",
                  f"  from: {', '.join(f'{x} = {name}' for x, name in first.inputs.items()) or 'nothing else'}"]
        lines += [f"  its input {name} is not in your file: check that first" for name in first.inputs.values()
                  if name in missing and not fed]
        usual = [*dict.fromkeys(words for _, words in edits(first))]
        if wrong[0].cause:
            lines.append(f"  found: {wrong[0].cause} (with this mistake the kit's tensors give yours)")
        elif usual and wrong[0].cause is not None:
            lines.append("  usual causes, of which none gives your tensor:" + "".join(f"\n    {x}" for x in usual))
        lines += [f"also found at {row.entry.name}: {row.cause}" for row in wrong[1:] if row.cause]
        if len(wrong) > 1 and not fed:
            lines.append("later deviations may follow from the first: feed each stage the kit's tensors (--fed) to see")
    return "\n".join(lines)
