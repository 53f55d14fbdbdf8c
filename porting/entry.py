"""`Entry` and `Cause`: what a kit knows of one tensor."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Tensors = dict[str, Tensor]


class Cause(NamedTuple):
    """A mistake in words and, where its result tells it, what it makes of this tensor.

    `result` takes the kit's tensors by name, with the port's own as "theirs", and this tensor as the kit has it; all
    in float64.
    """

    words: str
    result: Callable[[Tensors, Tensor], Tensor] | None = None


class Entry(NamedTuple):
    """One tensor of a kit: its formula, the kit's tensors that it is computed from, and what usually goes wrong."""

    name: str
    stage: str
    formula: str
    inputs: tuple[str, ...] = ()
    causes: tuple[Cause, ...] = ()
