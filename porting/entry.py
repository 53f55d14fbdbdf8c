"""`Entry` and `Cause`: the description of one tensor of a kit."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Tensors = dict[str, Tensor]


class Cause(NamedTuple):
    """A usual mistake in words and, where it can be recognized by its result, the tensor that it leads to.

    `result` takes the kit's tensors by name, with the port's tensor as "theirs", and this tensor as the kit has it, all
    in float64.
    """

    words: str
    result: Callable[[Tensors, Tensor], Tensor] | None = None


class Entry(NamedTuple):
    """One tensor of a kit: its formula, the kit's tensors that it is computed from, and the usual mistakes."""

    name: str
    stage: str
    formula: str
    inputs: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
