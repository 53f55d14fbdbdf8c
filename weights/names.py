"""How files name the weights: the grammar of the tables in `names_transformer`, `names_autoencoder` and `names_text`.

A table is a list of rows (ours, theirs) or (ours, theirs, transform), one table a layout:

- `{i}`, `{l}`, … (one letter) stand for a number, the same on both sides: a block, a level. `{half}` stands for
  encoder or decoder. `{last}` is the last dual block or level, `{last-l}` level l counted from the other end.
- A row of stems covers `.weight` and `.bias`; a row with an ending covers that tensor alone. The first row that
  matches a name of ours counts.
- `theirs` is one name, or several whose tensors are concatenated on axis 0 to make ours: all but the last have as many
  rows as the attention is wide, the last has the rest.
- The transform converts the stored tensor to ours and back.

Which tensors exist depends on the module: names are looked up for the entries of its `state_dict`, so a table has no
conditions. For a module on the meta device the lookup gives a layout's exact names and shapes without using memory.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
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
    if x.is_meta:  # the shape is the same, and the first arithmetic on meta takes torch a second
        return x
    first, second = x.chunk(2)
    return torch.cat([second, first])


UNCHANGED = Transform(lambda x, p: x, lambda x, p: x)

# (scale, shift) in the file, (shift, scale) here
SWAP_HALVES = Transform(_swap_halves, _swap_halves)

# a p x p convolution of stride p in the file, the same numbers as a Linear over flattened patches here
PATCH_CONV = Transform(
    lambda x, p: rearrange(x, "d c ph pw -> d (c ph pw)"),
    lambda x, p: rearrange(x, "d (c ph pw) -> d c ph pw", ph=p, pw=p),
)

# the numbers of an output patch in the order (row, column, channel) in the file, (channel, row, column) here
OUTPUT_PATCH = Transform(
    lambda x, p: rearrange(x, "(ph pw c) ... -> (c ph pw) ...", ph=p, pw=p),
    lambda x, p: rearrange(x, "(c ph pw) ... -> (ph pw c) ...", ph=p, pw=p),
)

# a 1 x 1 convolution in the file, a Linear here
CONV_1X1 = Transform(
    lambda x, p: rearrange(x, "rows columns 1 1 -> rows columns"),
    lambda x, p: rearrange(x, "rows columns -> rows columns 1 1"),
)


class Sizes(NamedTuple):
    """The sizes of a module that its name table depends on."""

    width: int = 0  # of the attention: rows of q, of k, of v
    last: int = 0  # the last dual block or level
    patch: int = 1


@dataclass(frozen=True, eq=False)
class Layout:
    """One way in which files store one kind of module."""

    name: str
    rows: list[tuple]
    sign: str  # a name that only files of this layout have
    prefixes: tuple[str, ...] = ()  # before every name in merged files; files without them are read too
    prefix: str = ""  # the one that is written
    ignored: tuple[str, ...] = ()  # endings of the names of tensors that the module does not use
    copies: Mapping[str, str] = field(default_factory=dict)  # alternative names: a file may use either or both
    needs: Mapping[str, object] = field(default_factory=dict)  # config values that this layout requires

    def find(self, ours: str, sizes: Sizes) -> tuple[list[str], Transform]:
        """The names under which the layout stores our tensor `ours`, and the transform between.

        Raises CheckpointError where the layout has no place for it.
        """
        for stem, theirs, *transform in self.rows:
            match = _pattern(stem, sizes.last).fullmatch(ours)
            if match:
                values = match.groupdict(default="")
                ending = values.pop("ending")
                if "l" in values:
                    values["last-l"] = sizes.last - int(values["l"])
                names = [theirs] if isinstance(theirs, str) else theirs
                names = [name.format_map({**values, "last": sizes.last}) + ending for name in names]
                return names, transform[0] if transform else UNCHANGED
        raise CheckpointError(f"the {self.name} layout has no place for {ours}: this model cannot be stored in it")

    def split(self, ours: Mapping[str, Tensor], sizes: Sizes) -> Iterator[tuple[str, str, Tensor]]:
        """(our name, their name, their tensor) of every tensor, views where the transform allows."""
        for name, tensor in ours.items():
            theirs, transform = self.find(name, sizes)
            rows = [sizes.width] * (len(theirs) - 1)
            rows.append(len(tensor) - sum(rows))
            for stored_as, part in zip(theirs, transform.write(tensor, sizes.patch).split(rows), strict=True):
                yield name, stored_as, part

    def join(self, ours: str, sizes: Sizes, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor `ours`, made of what `read` returns for the names it is stored under."""
        theirs, transform = self.find(ours, sizes)
        parts = [read(name) for name in theirs]
        return transform.read(torch.cat(parts) if len(parts) > 1 else parts[0], sizes.patch)


@cache
def _pattern(stem: str, last: int) -> re.Pattern:
    """The regular expression of a row's left side: placeholders become groups, the ending may follow."""
    pattern = stem.replace("{last}", str(last)).replace(".", r"\.").replace("{half}", "(?P<half>encoder|decoder)")
    return re.compile(re.sub(r"{(\w)}", r"(?P<\1>\\d+)", pattern) + r"(?P<ending>\.weight|\.bias)?")
