"""`check`: a port's tensors beside the kit's, stage by stage."""

from itertools import permutations
from typing import NamedTuple

from torch import Tensor

from .entry import Entry
from .kit import Kit, deviation
from .stages import entries

CLOSER = 5  # a mistake is taken for the cause if its result is that many times closer to the port's than the right one


class Row(NamedTuple):
    """What became of one tensor: `passed` is None where the port has none."""

    entry: Entry
    passed: bool | None
    said: str
    cause: str | None = None  # the mistake that makes the port's numbers of the kit's


def compare(kit: Kit, theirs: dict[str, Tensor]) -> list[Row]:
    """Every tensor of the kit in its order. Raises ValueError where the port has none of them."""
    if not kit.tensors.keys() & theirs.keys():
        first = next(iter(theirs), "no tensor at all")
        raise ValueError(f"none of the kit's tensors is there, but {first}: name them as in manifest.json")
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
            said = f"{off:.1e} of {tolerance:.1e}"
            passed = off <= tolerance
            rows.append(Row(entry, passed, said, None if passed else diagnose(entry, wide, found.double())))
    return rows


def other_shape(found: Tensor, wanted: Tensor, tolerance: float) -> str:
    """The shapes, and the transposition that would fit, preferably one that makes the numbers fit as well."""
    said = f"shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    if sorted(found.shape) != sorted(wanted.shape):
        return said
    fits = [axes for axes in permutations(range(found.ndim)) if found.permute(axes).shape == wanted.shape]
    nearest = min(fits, key=lambda axes: deviation(found.permute(axes), wanted))
    right = deviation(found.permute(nearest), wanted) <= tolerance
    return f"{said}: transposed by {nearest} the shape fits, the numbers {'too' if right else 'do not'}"


def diagnose(entry: Entry, tensors: dict[str, Tensor], found: Tensor) -> str | None:
    """The words of the mistake whose result is nearest, if it is much nearer than the right tensor."""
    tensors = tensors | {"theirs": found}
    own = tensors[entry.name]
    results = {cause.words: cause.result(tensors, own) for cause in entry.causes if cause.result}
    distances = {words: (found - result).norm().item() for words, result in results.items()
                 if result.shape == found.shape}  # a transposed picture may have another
    words = min(distances, key=distances.get, default=None)
    return words if words and distances[words] * CLOSER < (found - own).norm().item() else None


def report(rows: list[Row]) -> str:
    """The table, then the first deviation and what usually causes it."""
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
                 "are missing (“a of b”: the deviation and what is allowed, both relative, for whole numbers absolute)")
    if wrong:
        first = wrong[0].entry
        lines += [f"first deviation: {first.name}, in stage {first.stage}: {wrong[0].said}",
                  f"  it is: {first.formula}", f"  from: {', '.join(first.inputs) or 'the run in manifest.json'}"]
        if wrong[0].cause:
            lines.append(f"  found: {wrong[0].cause} (so changed, the kit's tensors give yours)")
        elif first.causes:
            lines.append("  usual causes:" + "".join(f"\n    {cause.words}" for cause in first.causes))
        lines += [f"also found at {row.entry.name}: {row.cause}" for row in wrong[1:] if row.cause]
        if len(wrong) > 1:
            lines.append("what follows a deviation may only carry it on: feed each stage from the kit's tensors to see")
    return "\n".join(lines)
