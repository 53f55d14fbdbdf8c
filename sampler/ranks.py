"""Groups across ranks: each of the processes that torchrun started paints its share of a batch, and all samples repel.

The mixing matrix of a push follows from the Gram matrix, a sum over the tokens' features, and the samples are then
mixed feature by feature. So for a push each rank sends its samples' features and receives its share of the features of
all samples (an all-to-all), the ranks add up the Gram matrix (an all-reduce of B × B numbers), each mixes its features,
and sends them back. No rank holds the tokens of all samples. One push of B samples of N · D features of e bytes, in g
branches of guidance, makes each of R ranks send 2 (1 − 1/R) g B/R N D e bytes and B × B numbers.
"""

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from repulsion import Repulsion, repel
from repulsion.repel import gram_matrix

from .methods import Method

LOST = "closed by peer|reset by peer|Broken pipe|NCCL|recv failed|refused"  # in what the others raise when a rank ends


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun: its number and how many there are. Without torchrun it is the only one."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None  # what all of them can read and write

    def split(self, images: int, repulsion: Repulsion | None = None, method: Method | None = None) -> dict:
        """The arguments `repulsion` and `method` with which a pipeline's call for a group of `images` pictures returns
        those of this rank. Shares differ by one picture at most; the first ranks have the larger ones.

        Raises ValueError for fewer pictures than ranks, and for a method or the autograd solver, which would need all
        pictures of the group in one process.
        """
        if self.size == 1:
            return {"repulsion": repulsion, "method": method}
        if images < self.size:
            raise ValueError(f"{images} images cannot be shared by {self.size} ranks: ask for {self.size} or more, or "
                             "start fewer")
        if method is not None:
            raise ValueError(f"{type(method).__name__} is not computed across ranks: start one process, or give "
                             "several prompts by --prompts, which ranks take in turn")
        sizes = shares(images, self.size)
        if repulsion is not None:
            given = {field.name: getattr(repulsion, field.name) for field in fields(Repulsion)}
            repulsion = RepulsionAcrossRanks(**given, sizes=tuple(sizes))
        return {"repulsion": repulsion, "method": Share(start=sum(sizes[: self.rank]), count=sizes[self.rank])}

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def left(self) -> bool:
        """Says that this rank has no more to do; whether another still has."""
        if self.size > 1:
            self.store.set(f"ended {self.rank}", "")
        return any(not self.store.check([f"ended {rank}"]) for rank in range(self.size) if rank != self.rank)

    def gather(self, pictures: list[Image.Image]) -> list[Image.Image] | None:
        """The pictures of all ranks, in order, on rank 0; None on the others."""
        if self.size == 1:
            return pictures
        found = None if self.rank else [None] * self.size
        dist.gather_object(pictures, found)
        return found and [picture for share in found for picture in share]


@dataclass(frozen=True)
class Share(Method):
    """Plain sampling of some of a group's pictures: the noise is that of their indices in the whole group."""

    start: int = 0
    count: int = 0

    def noise(self, draw: Callable[[int], Tensor], images: int) -> Tensor:
        return draw(images)[self.start : self.start + self.count]


@dataclass(frozen=True)
class RepulsionAcrossRanks(Repulsion):
    """The settings of a repulsion whose group is spread over ranks. sizes: how many samples each of them has."""

    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.solver != "gram":
            raise ValueError(f"repulsion solver {self.solver} needs all tokens in one process: use gram across ranks")

    def bind(self, block: int, num_blocks: int, groups: int = 1,
             num_context: int | None = None) -> Callable[[Tensor], Tensor] | None:
        """As `Repulsion.bind`; the tokens are this rank's samples of each group."""
        push = super().bind(block, num_blocks, groups, num_context)
        return push and partial(self.push, **push.keywords)

    def push(self, tokens: Tensor, *, groups: int, last_group: bool, first: int | None, **settings) -> Tensor:
        """`repel` of the samples of all ranks: this rank's tokens (groups · b, N, D) → the same shape."""
        branches = 1 if last_group else groups
        part = slice(len(tokens) - branches * len(tokens) // groups, None), slice(first)
        if not tokens[part].numel():
            return tokens
        features = to_features(tokens[part], branches, self.sizes)
        pushed = repel(features, groups=branches, gram=gram_of_all, **settings)
        pushed = to_samples(pushed, branches, self.sizes, tokens.shape[-1])
        if pushed.shape == tokens.shape:
            return pushed
        result = tokens.clone()
        result[part] = pushed
        return result


def gram_of_all(c: Tensor) -> np.ndarray:
    """The Gram matrix of tokens of which each rank holds a part of the features: c (g, B, N, D / R) → (g, B, B)."""
    gram = torch.from_numpy(gram_matrix(c)).to(c.device)
    dist.all_reduce(gram)
    return gram.numpy(force=True)


def to_features(tokens: Tensor, groups: int, sizes: Sequence[int]) -> Tensor:
    """This rank's samples (groups · b, N, D) → its share of the features of all samples (groups · B, N, D / R).

    Rank r has `sizes[r]` samples of each group; those of rank 0 come first. D need not be a multiple of R.
    """
    pieces = tokens.unflatten(0, (groups, -1)).tensor_split(len(sizes), dim=-1)
    n, d = pieces[dist.get_rank()].shape[2:]
    return torch.cat(exchange(pieces, [(groups, b, n, d) for b in sizes]), dim=1).flatten(0, 1)


def to_samples(features: Tensor, groups: int, sizes: Sequence[int], width: int) -> Tensor:
    """The inverse of `to_features`; `width` is D."""
    pieces = features.unflatten(0, (groups, -1)).split(sizes, dim=1)
    shapes = [(*pieces[dist.get_rank()].shape[:3], d) for d in shares(width, len(sizes))]
    return torch.cat(exchange(pieces, shapes), dim=-1).flatten(0, 1)


def exchange(pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Sends pieces[r] to rank r → what rank r sent here, of shapes[r]; as bytes, since gloo lacks some dtypes."""
    sent = torch.cat([piece.flatten() for piece in pieces])
    sizes = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8),
                           [size * sent.itemsize for size in sizes], [x.numel() * sent.itemsize for x in pieces])
    return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]


def shares(count: int, ranks: int) -> list[int]:
    """How many of `count` each rank gets: as equal as possible, the first ones more."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of torchrun, or the only one without it. If one of them fails, all end, and one says why.

    The first that fails says so in the store, which torchrun's own process holds, and raises its error. The others fail
    at their next exchange and exit with 2, silently, or torchrun ends them; it then adds its own report.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(store=store, rank=rank, world_size=size)
    if rank:
        warnings.simplefilter("ignore")  # rank 0 warns
    try:
        yield Ranks(rank, size, store)
    except BaseException as error:
        if store.add("failed", 1) > 1:
            leave(2)
        if isinstance(error, RuntimeError) and re.search(LOST, str(error)):
            raise ConnectionError("another rank ended without a word: was it killed, for lack of memory?") from error
        raise
    dist.destroy_process_group()


def leave(code: int = 0) -> None:
    """Ends a process of torchrun with this exit code; any other goes on.

    Without what Python does at its end: FSDP's device mesh keeps gloo's threads, and one that then lets go of a tensor
    aborts the process (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
