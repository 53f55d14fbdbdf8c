"""`evaluate`: a formula's result from the kit's inputs and the checkpoint's weights; `find`: the mistake of a port."""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mmdit.trace import PARTS
from weights import Stored
from weights.configs import sizes_of
from weights.layouts import OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, Transform

from .stages import HERE, Entry

Read = tuple[str, str, int | None]  # a network, a name in it, and which part of a tensor that joins q, k, v, mlp

CODE = (HERE / "formulas.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
FUNCTIONS = {x.split("(")[0][4:]: x.strip() + "\n" for x in re.findall(r"^def (?s:.*?)(?=^def |\Z)", CODE, re.M)}
exec(CODE, SCOPE := {})
TRAPS = {SWAP_HALVES: "stored as (scale, shift)", OUTPUT_PATCH: "its rows are stored as (p q c): make them (c p q)",
         PATCH_CONV: "a convolution (d, c, p, p): flatten it as (c p q)"}
KINDS = "q", "k", "v", "mlp"  # in tensors that join several
SWAPS = (r"norm_q", "norm_k"), (r"norm_1", "norm_2"), ("conv_1", "conv_2"), ("gate", "value"), (".context.", ".image.")
MISTAKES = (HERE / "mistakes.txt").read_text(encoding="utf-8").splitlines()[2:]
STORED = "weight", "bias", "position_table", "latent_mean", "latent_variance"
CLOSER = 5  # a mistake is found where its result is that many times closer to the port's tensor than the kit's is


class Weights:
    """The weights of all networks by path, in `dtype`; `used`: what was read, `change(read)`: what to give instead."""

    def __init__(self, networks: dict[str, Stored], dtype: torch.dtype = torch.float64):
        self.networks, self.dtype, self.change, self.used = networks, dtype, None, []
        self.state = cache(lambda network: networks[network].load().state_dict())

    def __call__(self, path: str) -> Tensor | None:
        network, _, name = path.partition(".")
        state, found = self.state(network), None
        for joined, part in product(("qkv", "linear_in"), range(4)):
            whole = re.sub(rf"\b{KINDS[part]}\.(weight|bias)$", rf"{joined}.\1", name)
            if whole in state and whole != name and (part < 3 or joined == "linear_in"):
                found = network, whole, part
        found = (network, name, None) if name in state else found
        if found:
            self.used.append(found)
            return (self.change or self.raw)(found).to(self.dtype)

    def raw(self, read: Read) -> Tensor:
        network, name, part = read
        tensor = self.state(network)[name]
        size = len(tensor) // 3 if "qkv" in name else self.state(network)[name.replace(".bias", ".weight")].shape[-1]
        return tensor if part is None else tensor[part * size : None if part == 3 else (part + 1) * size]

    def named(self, read: Read) -> tuple[str, Transform]:
        """What the file calls it, and the transform between."""
        stored, part = self.networks[read[0]], read[2]
        theirs, transform = stored.part.layout.find(read[1], sizes_of(stored.config))
        if part is not None:
            theirs = [theirs[part] if len(theirs) > 1 else f"{theirs[0]}, its {KINDS[part]}"]
        return " + ".join(stored.part.prefix + one for one in theirs), transform


class Place:
    """The weights at a path, as the formulas call them: w.layers[0].norm_1.weight; None where there are none."""

    def __init__(self, weights: Weights, path: str):
        self._weights, self._path = weights, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        return self._weights(path) if name in STORED else Place(self._weights, path)

    def __getitem__(self, i: int) -> "Place":
        return Place(self._weights, f"{self._path}.{i}")


@cache
def used_by(text: str) -> tuple[str, ...]:
    """The functions that a formula uses, directly or not, in their order."""
    names = [x for x in FUNCTIONS if re.search(rf"(?<![.\w])(?<!def ){x}\b", text)]
    more = {x for name in names for x in used_by(FUNCTIONS[name])}
    return tuple(x for x in FUNCTIONS if x in more or x in names)


def source(formula: str) -> str:  # the functions that it uses, and the formula as the last line
    return "".join(FUNCTIONS[name] for name in used_by(formula)) + f"result = {formula}"


@torch.no_grad()
def evaluate(entry: Entry, tensors: dict[str, Tensor], weights: Weights, text: str = "") -> Tensor:
    """The result in the dtype of the weights, noise levels and latents in at least float32; `text`: of that source."""
    scope = SCOPE | {"w": Place(weights, entry.place)}
    functions, _, formula = (text or source(entry.formula)).rpartition("result = ")
    exec(functions, scope)
    for variable, name in entry.inputs.items():
        narrow = weights.dtype.itemsize < 4 and re.match("sigmas|latent|noise|velocity", name)
        scope[variable] = x = tensors[name] if narrow or tensors[name].dtype != torch.float32 else tensors[name].to(
            weights.dtype)
        scope |= dict(zip(PARTS, x.unsqueeze(2).unbind(1), strict=False)) if variable == "modulation" else {}
    return eval(formula, scope)


def edits(entry: Entry) -> Iterator[tuple[str, str]]:
    """The source of a formula with each mistake that it can have, and the mistake in words; see mistakes.txt."""
    text, name = source(entry.formula), ""
    for line in MISTAKES if entry.formula else ():
        where, old, versions, words = re.fullmatch(r"(.*?) ?:: (.*?) =>(.*)  # (.*)", line).groups()
        name, old = where or name, r"(?s)result = (.*)$" if old == "RESULT" else old
        for new in versions.split(" | ") if re.search(name, entry.name) else ():
            new = re.sub(r"(.*)RESULT(.*)", r"result = \1(\\1)\2", new.strip())
            if (edited := re.sub(old, new, text)) != text:
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
        yield (lambda x, ab={a: b, b: a}: raw((*x[:2], ab.get(x[2], x[2])))), f"{KINDS[a]} for {KINDS[b]}"
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

    tried = [(distance(), "")] if entry.formula else [(math.inf, "")]
    reads = [*dict.fromkeys(weights.used)] if entry.formula else []
    tried += [(distance(text=text), words) for text, words in edits(entry)]
    tried += [(distance(change), words) for change, words in (changes(weights, reads) if reads else ())]
    off, words = min(tried)
    return words if off * CLOSER < (tensors[entry.name].double() - theirs).norm() else None

