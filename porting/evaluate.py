"""`evaluate`: a formula's result from the kit's inputs and the checkpoint's weights; `find`: the mistake in a port's."""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmdit.trace import PARTS
from weights import Stored
from weights.configs import sizes_of
from weights.layouts import OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, Transform

from .stages import HERE, Entry

Read = tuple[str, str, int | None]  # a network, a name in it, and which part of a tensor that joins q, k, v, mlp

FUNCTIONS = {re.match(r"def (\w+)", code)[1]: code.strip() + "\n" for code in re.findall(
    r"^def .*?(?=^def |^```)", (HERE / "formulas.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)}
SCOPE = {"torch": torch, "rearrange": rearrange, "eigh": torch.linalg.eigh, "eigvalsh": torch.linalg.eigvalsh,
         **{x: getattr(math, x) for x in ("exp", "inf", "pi")}, "interpolate": F.interpolate, "affine": F.linear,
         **{x: getattr(torch, x) for x in ("arange", "cat", "cos", "eye", "sin", "stack", "tanh", "zeros")},
         **{x: getattr(F, x) for x in ("conv2d", "gelu", "pad", "silu", "softmax")}}
exec("".join(FUNCTIONS.values()), SCOPE)
TRAPS = {SWAP_HALVES: "stored as (scale, shift)", OUTPUT_PATCH: "its rows are stored as (p q c): make them (c p q)",
         PATCH_CONV: "a convolution (d, c, p, p): flatten it as (c p q)"}
SWAPS = (r"norm_q", "norm_k"), (r"norm_1", "norm_2"), ("conv_1", "conv_2"), ("gate", "value"), (".context.", ".image.")
CLOSER = 5  # a mistake is found where its result is that many times closer to the port's tensor than the kit's is


class Weights:
    """The weights of all networks by path, such as `transformer.dual_blocks.0`, in `dtype`. `used` collects what was
    read; `change(read)` replaces what a read gives."""

    def __init__(self, networks: dict[str, Stored], dtype: torch.dtype = torch.float64):
        self.networks, self.dtype, self.change, self.used = networks, dtype, None, []
        self.state = cache(lambda network: networks[network].load().state_dict())

    def __call__(self, path: str) -> Tensor | None:
        network, _, name = path.partition(".")
        state, found = self.state(network), None
        for joined, part in product(("qkv", "linear_in"), range(4)):
            whole = re.sub(rf"\b{['q', 'k', 'v', 'mlp'][part]}\.(weight|bias)$", rf"{joined}.\1", name)
            if whole in state and whole != name and (part < 3 or joined == "linear_in"):
                found = network, whole, part
        found = (network, name, None) if name in state else found
        if found:
            self.used.append(found)
            return (self.change or self.raw)(found).to(self.dtype)

    def raw(self, read: Read) -> Tensor:
        """In our order, as it is stored."""
        network, name, part = read
        tensor = self.state(network)[name]
        size = len(tensor) // 3 if "qkv" in name else self.state(network)[name.replace(".bias", ".weight")].shape[-1]
        return tensor if part is None else tensor[part * size : None if part == 3 else (part + 1) * size]

    def named(self, read: Read) -> tuple[str, Transform]:
        """What the file calls it, and the transform between."""
        stored, part = self.networks[read[0]], read[2]
        theirs, transform = stored.part.layout.find(read[1], sizes_of(stored.config))
        if part is not None:
            theirs = [theirs[part] if len(theirs) > 1 else f"{theirs[0]}, its {['q', 'k', 'v', 'mlp'][part]}"]
        return " + ".join(stored.part.prefix + one for one in theirs), transform


class Place:
    """The weights at a path, as the formulas call them: w.layers[0].norm_1.weight; None where there are none."""

    def __init__(self, weights: Weights, path: str):
        self._weights, self._path = weights, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        return self._weights(path) if name in ("weight", "bias", "position_table") else Place(self._weights, path)

    def __getitem__(self, i: int) -> "Place":
        return Place(self._weights, f"{self._path}.{i}")


@cache
def used_by(formula: str) -> tuple[str, ...]:
    """The functions that a formula uses, directly or not, in their order."""
    names, text = set(), formula
    while more := {name for name in FUNCTIONS if re.search(rf"(?<![.\w]){name}\b", text)} - names:
        names, text = names | more, "".join(FUNCTIONS[name] for name in more)
    return tuple(name for name in FUNCTIONS if name in names)


def source(formula: str) -> str:
    """The functions that a formula uses, and the formula as the last line."""
    return "".join(FUNCTIONS[name] for name in used_by(formula)) + f"result = {formula}"


@torch.no_grad()
def evaluate(entry: Entry, tensors: dict[str, Tensor], weights: Weights, text: str = "") -> Tensor:
    """The result in the dtype of the weights; what the kit has in float64, noise levels and latents stay as they are.
    `text` replaces the entry's `source`."""
    scope = SCOPE | {"w": Place(weights, entry.place), "inside": inside, "masked": masked}
    functions, _, formula = (text or source(entry.formula)).rpartition("result = ")
    exec(functions, scope)
    for variable, name in entry.inputs.items():
        narrow = weights.dtype.itemsize < 4 and re.match("sigmas|latent|noise|velocity", name)
        scope[variable] = x = tensors[name] if narrow or tensors[name].dtype != torch.float32 else tensors[name].to(
            weights.dtype)
        scope |= dict(zip(PARTS, x.unsqueeze(2).unbind(1), strict=False)) if variable == "modulation" else {}
    return eval(formula, scope)


@cache
def table() -> list[tuple[str, str, str, str]]:
    """The lines of mistakes.txt, one for each version: the name's pattern, the formula's, the mistake, the words."""
    rows, name = [], ""
    for line in (HERE / "mistakes.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            where, old, versions, words = re.fullmatch(r"(.*?) ?:: (.*?) =>(.*)  # (.*)", line).groups()
            name, old = where or name, r"(?s)result = (.*)$" if old == "RESULT" else old
            rows += [(name, old, re.sub(r"(.*)RESULT(.*)", r"result = \1(\\1)\2", new.strip()), words)
                     for new in versions.split(" | ")]
    return rows


def edits(entry: Entry) -> Iterator[tuple[str, str]]:
    """The source of a formula with each mistake that it can have, and the mistake in words."""
    text = source(entry.formula)
    for name, old, new, words in table() if entry.formula else ():
        if re.search(name, entry.name) and (edited := re.sub(old, new, text)) != text:
            yield edited, words


def changes(weights: Weights, reads: list[Read]) -> Iterator[tuple[Callable[[Read], Tensor], str]]:
    """Ways to take other weights than those that a formula reads, and each in words."""
    raw = weights.raw
    square = [read for read in reads if raw(read).ndim == 2 and len({*raw(read).shape}) == 1]
    for some in [square, *([read] for read in square)]:
        names = ", ".join(weights.named(read)[0] for read in some)
        yield (lambda x, some=some: raw(x).mT if x in some else raw(x)), f"not transposed: {names} (outputs, inputs)"
    if trap := {x: weights.named(x) for x in reads if weights.named(x)[1] in TRAPS}:
        p = getattr(weights.networks[reads[0][0]].config, "patch_size", 1)
        yield (lambda x: trap[x][1].write(raw(x), p).reshape(raw(x).shape) if x in trap else raw(x)), "; ".join(
            f"{name}: {TRAPS[how]}" for name, how in trap.values())
    yield (lambda x: raw(x) * (not x[1].endswith("bias"))), "the bias left out"
    for a, b in SWAPS:
        yield (lambda x, ab={a: b, b: a}: raw((x[0], re.sub(
            "|".join(map(re.escape, ab)), lambda m: ab[m[0]], x[1]), x[2]))), f"{a.strip('.')} for {b.strip('.')}"
    for a, b in (0, 1), (0, 2), (1, 2):
        yield (lambda x, ab={a: b, b: a}: raw((*x[:2], ab.get(x[2], x[2])))), f"{'qkv'[a]} and {'qkv'[b]} swapped"
    for other in (lambda i: i + 1), (lambda i: i - 1), (lambda i: 1 - i if i < 2 else i):
        yield (lambda x, i=other: raw((x[0], re.sub(r"\d+", lambda m: str(i(int(m[0]))), x[1], count=1), x[2]))), (
            "the weights of another layer or block")


def find(entry: Entry, tensors: dict[str, Tensor], weights: Weights, theirs: Tensor) -> str | None:
    """The mistake whose result is nearest to the port's tensor, if it is much nearer than the kit's tensor."""
    def distance(change: Callable | None = None, text: str = "") -> float:
        weights.change, weights.used = change, []
        try:
            result = evaluate(entry, tensors, weights, text).double()
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError):
            return math.inf  # this formula cannot have that mistake; or the checkpoint is not here
        off = (result - theirs).norm().item() if result.shape == theirs.shape else math.inf
        return off if off == off else math.inf

    own = (tensors[entry.name].double() - theirs).norm().item()
    tried = [(distance(), "")] if entry.formula else []
    reads = [*dict.fromkeys(weights.used)] if entry.formula else []
    tried += [(distance(text=text), words) for text, words in edits(entry)]
    tried += [(distance(change), words) for change, words in (changes(weights, reads) if reads else ())]
    off, words = min(tried, default=(math.inf, ""))
    return words or None if off * CLOSER < own else None


def inside(x: Tensor, w: Any, part: str, h: int) -> Tensor:
    """A projection whose rows are taken as (h q/k/v k)."""
    joined = [torch.cat([getattr(getattr(w, one), kind) for one in "qkv"]) for kind in ("weight", "bias")]
    return rearrange(F.linear(x, *joined), "b n (h three k) -> three b h n k", h=h, three=3)["qkv".index(part)]


def masked(ids: Tensor) -> Tensor:
    """The bias of scores that hides the padding: (b, 1, 1, n)."""
    return torch.where(ids == ids[:, -1:], -math.inf, 0.0)[:, None, None]
