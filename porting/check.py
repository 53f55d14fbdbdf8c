"""`compare` and `report`: a port's tensors against the kit's, stage by stage."""

from itertools import permutations
from typing import NamedTuple

from torch import Tensor

from .entry import Entry
from .kit import Kit, deviation
from .stages import entries

CLOSER = 5  # a mistake is reported as found where its result is that many times closer to the port's than the kit's


class Row(NamedTuple):
    """The result for one tensor: `passed` is None where the port has no such tensor."""

    entry: Entry
    passed: bool | None
    said: str
    cause: str | None = None  # the mistake that reproduces the port's tensor from the kit's


def compare(kit: Kit, theirs: dict[str, Tensor]) -> list[Row]:
    """A row for each tensor of the kit, in its order. Raises ValueError where the port has none of them."""
    if not kit.tensors.keys() & theirs.keys():
        first = next(iter(theirs), "no tensor at all")
        raise ValueError(f"none of the kit's tensors is there, the first is {first}: name tensors as in manifest.json")
    wide = {name: tensor.double() for name, tensor in kit.tensors.items()}
    rows = []
    for entry, about in zip(entries(kit.run), kit.rows, strict=True):
        wanted, found, tolerance = kit.tensors[entry.name], theirs.get(entry.name), about["tolerance"]
        if found is None:
            rows.append(Row(entry, None, "missing"))
        elif found.shape != wanted.shape:
            rows.append(Row(entry, False, other_shape(found, wanted, tolerance)))
        elif not found.isfinite().all():
            rows.append(Row(entry, False, f"NaN or infinity in {(~found.isfinite()).sum()} of {found.numel()} numbers"))
        else:
            off = deviation(found, wanted)
            cause = None if off <= tolerance else diagnose(entry, wide, found.double())
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


def diagnose(entry: Entry, tensors: dict[str, Tensor], found: Tensor) -> str | None:
    """The mistake whose result is nearest to the port's tensor, if it is much nearer than the kit's tensor."""
    tensors = tensors | {"theirs": found}
    own = tensors[entry.name]
    results = {cause.words: cause.result(tensors, own) for cause in entry.causes if cause.result}
    distances = {words: (found - result).norm().item() for words, result in results.items()
                 if result.shape == found.shape and result.isfinite().all()}  # a transposed picture has another shape
    words = min(distances, key=distances.get, default=None)
    return words if words and distances[words] * CLOSER < (found - own).norm().item() else None


def report(rows: list[Row]) -> str:
    """The table, then the first deviation and its cause or usual causes."""
    width = max(len(row.entry.name) for row in rows)
    lines, stage = [], None
    for row in rows:
        if row.entry.stage != stage:
            stage = row.entry.stage
            lines.append(f"{stage}:")
        mark = {True: "ok", False: "DEVIATES", None: "-"}[row.passed]
        lines.append(f"  {row.entry.name:{width}}  {mark:8}  {row.said}")
    wrong = [row for row in rows if row.passed is False]
    missing = sum(row.passed is None for row in rows)
    lines.append(f"\n{len(rows) - len(wrong) - missing} of {len(rows)} tensors pass, {len(wrong)} deviate, {missing} "
                 "are missing (“a of b”: the deviation and its tolerance, both relative, for whole numbers absolute)")
    if wrong:
        first = wrong[0].entry
        lines += [f"first deviation: {first.name}, in stage {first.stage}: {wrong[0].said}",
                  f"  formula: {first.formula}", f"  from: {', '.join(first.inputs) or 'the run in manifest.json'}"]
        if wrong[0].cause:
            lines.append(f"  found: {wrong[0].cause} (with this mistake the kit's tensors give yours)")
        elif first.causes:
            lines.append("  usual causes:" + "".join(f"\n    {cause.words}" for cause in first.causes))
        lines += [f"also found at {row.entry.name}: {row.cause}" for row in wrong[1:] if row.cause]
        if len(wrong) > 1:
            lines.append("later deviations may follow from the first: compute each stage from the kit's tensors to see")
    return "\n".join(lines)
