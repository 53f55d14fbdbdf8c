"""How files name the weights: the grammar of the tables in `tables`.

A table is a list of rows (ours, theirs) or (ours, theirs, transform), one table a layout:

- `{i}`, `{l}`, … (one letter) stand for a number or a word, the same on both sides: a block, a level. `{half}` stands
  for encoder or decoder. `{last}` is the last dual block or level, `{last-l}` level l counted from the other end.
- Words in braces, `{image,context}` and `{img,txt}`, make one row each, the first with the first; several lists are
  taken from left to right. A list that only the right side has, `{q,k,v}`, names tensors that are concatenated on axis
  0 to make ours: all but the last have as many rows as the attention is wide, the last has the rest.
- A row of stems covers `.weight` and `.bias`; a row with an ending covers that tensor alone. The first row that
  matches a name of ours counts.
- The transform converts the stored tensor to ours and back.

Which tensors exist depends on the module: names are looked up for the entries of its `state_dict`, so a table has no
conditions. For a module on the meta device the lookup gives a layout's exact names and shapes without using memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint, or a part of it, cannot be read, does not fit, or cannot be stored as asked."""


class Transform(NamedTuple):
    """Two inverse functions of a tensor and the patch size p (which only the patch transforms use)."""

    read: Callable[[Tensor, int], Tensor]  # theirs -> ours
    write: Callable[[Tensor, int], Tensor]  # ours -> theirs


def _swap_halves(x: Tensor, p: int) -> Tensor:
    # on meta the shape is all there is, and the first arithmetic there takes torch a second
    return x if x.is_meta else torch.cat(x.chunk(2)[::-1])


def _rearranged(pattern: str) -> Transform:
    """The transform that reads with an einops pattern and writes with its reverse; (ph, pw) are a patch's sides."""
    sides, reverse = ("ph", "pw") if "ph" in pattern else (), " -> ".join(pattern.split(" -> ")[::-1])
    return Transform(lambda x, p: rearrange(x, pattern, **dict.fromkeys(sides, p)),
                     lambda x, p: rearrange(x, reverse, **dict.fromkeys(sides, p)))


UNCHANGED = Transform(lambda x, p: x, lambda x, p: x)
SWAP_HALVES = Transform(_swap_halves, _swap_halves)  # (scale, shift) in the file, (shift, scale) here
# a convolution of stride p in the file, a Linear over flattened patches here
PATCH_CONV = _rearranged("d c ph pw -> d (c ph pw)")
# the numbers of an output patch in the order (row, column, channel) in the file, (channel, row, column) here
OUTPUT_PATCH = _rearranged("(ph pw c) ... -> (c ph pw) ...")
CONV_1X1 = _rearranged("rows columns 1 1 -> rows columns")  # a 1 x 1 convolution in the file, a Linear here


class Sizes(NamedTuple):
    """The sizes of a module that its name table depends on."""

    width: int = 0  # of the attention: rows of q, of k, of v; 0: a third each
    last: int = 0  # the last dual block or level
    patch: int = 1


@dataclass(frozen=True, eq=False)
class Layout:
    """One way in which files store one kind of module."""

    name: str
    sign: str  # a name that only files of this layout have, whatever prefix stands before all names
    rows: list[tuple]
    prefix: str = ""  # before every name that is written
    alias: tuple[str, str] = ("$^", "")  # pattern of other names that files use, and what the rows have instead

    def find(self, ours: str, sizes: Sizes) -> tuple[list[str], Transform]:
        """The names under which the layout stores our tensor `ours`, and the transform between.

        Raises CheckpointError where the layout has no place for it.
        """
        for stem, theirs, transform in self._expanded:
            match = _pattern(stem, sizes.last).fullmatch(ours)
            if match:
                values = match.groupdict(default="")
                ending = values.pop("ending")
                if "l" in values:
                    values["last-l"] = sizes.last - int(values["l"])
                return [name.format_map({**values, "last": sizes.last}) + ending for name in theirs], transform
        raise CheckpointError(f"the {self.name} layout has no place for {ours}: this model cannot be stored in it")

    def split(self, ours: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, str, Tensor]]:
        """(our name, their name, their tensor) of every tensor, views where the transform allows."""
        for name, tensor in ours.items():
            theirs, transform = self.find(name, sizes)
            rows = [sizes.width or len(tensor) // len(theirs)] * (len(theirs) - 1)
            rows.append(len(tensor) - sum(rows))
            for stored_as, part in zip(theirs, transform.write(tensor, sizes.patch).split(rows), strict=True):
                yield name, stored_as, part

    @cached_property
    def _expanded(self) -> list[tuple[str, list[str], Transform]]:
        """The rows without lists of words: our name, their names, the transform."""
        return [(*names, transform[0] if transform else UNCHANGED)
                for ours, theirs, *transform in self.rows for names in _expand(ours, theirs)]


def _expand(ours: str, theirs: str) -> Iterator[tuple[str, list[str]]]:
    """The pairs of names that a row stands for: its lists of words are taken from left to right."""
    lefts, rights = _words(ours), _words(theirs)
    if lefts == [ours]:
        yield ours, rights
    else:
        for left, right in zip(lefts, rights, strict=True):
            yield from _expand(left, right)


def _words(name: str) -> list[str]:
    """The names that the first list of words in a name stands for; the name itself where it has none."""
    before, *rest = re.split(r"{([\w.]+(?:,[\w.]+)+)}", name, maxsplit=1)
    return [before + word + rest[1] for word in rest[0].split(",")] if rest else [name]


@cache
def _pattern(stem: str, last: int) -> re.Pattern:
    """The regular expression of a row's left side: placeholders become groups, the ending may follow."""
    pattern = stem.replace("{last}", str(last)).replace(".", r"\.").replace("{half}", "(?P<half>encoder|decoder)")
    return re.compile(re.sub(r"{(\w)}", r"(?P<\1>\\w+)", pattern) + r"(?P<ending>\.weight|\.bias)?")
