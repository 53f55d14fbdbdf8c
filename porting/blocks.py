"""The tensors inside the transformer: of the first and the last block of each kind, and of one push."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.trace import PARTS

from . import mistakes as m
from .entry import Cause, Entry, Tensors
from .push import push
from .run import Run

SHIFT, _, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE, SECOND_SHIFT, _, SECOND_GATE = range(len(PARTS))
HEADS = Cause("heads as (k h): they are (h k)", lambda k, own: m.transposed_heads(own))
LAYER = Cause("the layer of the other stream")
JOINED = (Cause("heads joined as (k h): they are (h k)"), LAYER)
BETWEEN = Cause("a block left out or run twice, or repulsion in another block")


def blocks(run: Run) -> Iterator[Entry]:
    dual, single = run.transformer.num_dual_blocks, run.transformer.num_single_blocks
    for i in range(dual):
        if i in (0, dual - 1):
            yield from dual_block(run, i)
        elif i == run.pushed_block:
            formula = f"the context output of the attention of dual.{i}"
            yield from push(run, f"dual.{i}", returned(run, "dual.0.context", "dual.0.image"), formula, (BETWEEN,))
    for i in sorted({0, single - 1} if single else ()):
        yield from single_block(run, i)


def returned(run: Run, *places: str) -> tuple[str, ...]:
    """The tensors that later blocks are computed from."""
    rope = ("dual.0.rope.in",) if run.transformer.position == "rope" else ()
    return (*(f"{place}.out" for place in places), "dual.0.vector.in", *rope)


def part(k: Tensors, modulation: str, index: int) -> Tensor:
    return k[modulation][:, index, None]


def modulation(stage: str, name: str, count: int) -> Entry:
    swapped = Cause("scale before shift: the hub's files store norm_out and SD3's last norm1_context so",
                    lambda k, own: own.flip(1))
    return Entry(name, stage, f"({', '.join(PARTS[:count])}) = W SiLU(vector) + b", ("dual.0.vector.in",), (
        *((swapped,) if count == 2 else ()),
        Cause("the layer's rows as (d parts): they are (parts d)", lambda k, own: own.mT.reshape(own.shape)),
        Cause("no SiLU before the layer"),
    ))


def modulated(stage: str, name: str, modulation: str, what: str, inputs: tuple[str, ...],
              x: Callable[[Tensors], Tensor], first: int = SHIFT, *causes: Cause) -> Entry:
    """LayerNorm of x(k), shifted and scaled by the parts `first` and `first` + 1 of a modulation."""
    def result(k: Tensors, shift: int = first, scale: int = first + 1, one: float = 1.0) -> Tensor:
        return (one + part(k, modulation, scale)) * m.normed(x(k)) + part(k, modulation, shift)

    formula = f"(1 + {PARTS[first + 1]}) · LayerNorm({what}, eps 1e-6) + {PARTS[first]}"
    return Entry(name, stage, formula, (*inputs, modulation), (
        Cause("shift and scale swapped", lambda k, own: result(k, first + 1, first)),
        Cause("scale for 1 + scale", lambda k, own: result(k, one=0.0)),
        Cause("LayerNorm's eps (1e-6)"),
        *causes,
    ))


def attention(run: Run, block: str, inputs: tuple[str, ...]) -> Iterator[Entry]:
    """v first, the plain projection, then q and k, which are normalized and rotated, then the result."""
    place, config, rope = f"{block}.attention", run.transformer, "dual.0.rope.in"
    q, k_, v = (f"{place}.{name}" for name in "qkv")
    order = Cause("the image's tokens before the context's",
                  lambda k, own: own.roll(-k["context_in.out"].shape[1], 2))
    yield Entry(v, block, "W x + b, rows as (q/k/v h k); the context's tokens, then the image's", inputs, (
        HEADS, order, Cause("rows in another order: first all of q, then k, then v, each as (h k)"), LAYER,
    ))
    formula = "W x + b as in v" + ", RMSNorm over k (eps 1e-6)" * config.qk_norm
    causes = [Cause("the norm: left out, over all heads at once, its eps (1e-6), or the other stream's weight")]
    if config.position == "rope":
        formula += ", then each pair (x, y) of neighbors 2j, 2j + 1 rotated: (x cos − y sin, x sin + y cos)"
        inputs = (*inputs, rope)
        causes = [
            Cause("RoPE: pairs (j, j + k/2): they are neighbors", lambda k, own: m.halves(own, k[rope])),
            Cause("RoPE: rotated the other way", lambda k, own: m.rotate_back(own, k[rope], times=2)),
            Cause("RoPE: not rotated", lambda k, own: m.rotate_back(own, k[rope])), *causes,
        ]
    for name in (q, k_):
        yield Entry(name, block, formula, inputs, (*causes, HEADS, order, LAYER))

    def attend(k: Tensors, **how) -> Tensor:
        return F.scaled_dot_product_attention(k[q], k[k_], k[v], **how)

    yield Entry(f"{place}.attended", block, "softmax(q kᵀ / √k) v, over all tokens of both streams", (q, k_, v), (
        Cause("no 1/√k in the scores", lambda k, own: attend(k, scale=1.0)),
        Cause("scores divided by k, not √k", lambda k, own: attend(k, scale=1 / own.shape[-1])),
        Cause("a causal mask: every token attends to every other", lambda k, own: attend(k, is_causal=True)),
        Cause("softmax over the queries: it is over the keys"),
    ))


def gelu(stage: str, name: str, before: str) -> Entry:
    return Entry(name, stage, "GELU in its tanh form", (before,), (
        Cause("exact GELU: it is the tanh form", lambda k, own: F.gelu(k[before])),
        Cause("quick_gelu: it is GELU's tanh form", lambda k, own: k[before] * torch.sigmoid(1.702 * k[before])),
        Cause("SiLU: it is GELU's tanh form", lambda k, own: F.silu(k[before])),
    ))


def dual_block(run: Run, i: int) -> Iterator[Entry]:
    config, block = run.transformer, f"dual.{i}"
    last = config.context_ends_early and i == config.num_dual_blocks - 1
    second = i in config.dual_attention_blocks
    streams = ("context", "image")
    kept = ("image",) if last else streams  # the context output of the last block of SD3 is unused
    for stream in streams if i else ():
        yield Entry(f"{block}.{stream}.in", block, f"the output of dual.{i - 1}",
                    returned(run, "dual.0.context", "dual.0.image"), (BETWEEN,))
    for stream in streams:
        count = 2 if stream not in kept else 9 if second and stream == "image" else 6
        yield modulation(block, f"{block}.{stream}.modulation", count)
    for stream in streams:
        name = f"{block}.{stream}"
        yield modulated(block, f"{block}.attention.{stream}.in", f"{name}.modulation", stream, (f"{name}.in",),
                        lambda k, name=name: k[f"{name}.in"])
    yield from attention(run, block, tuple(f"{block}.attention.{stream}.in" for stream in streams))
    for stream in kept:
        name, formula = f"{block}.attention.{stream}.out", f"heads joined as (h k), the {stream}'s tokens, W x + b"
        inputs = (f"{block}.attention.attended",)
        if stream == "context" and run.pushes(i):
            yield from push(run, block, inputs, formula, JOINED)
            yield Entry(name, f"{block}.repulsion", f"{block}.repulsion.out", (f"{block}.repulsion.out",))
        else:
            yield Entry(name, block, formula, inputs, JOINED)
    if second:
        yield modulated(block, f"{block}.image_attention.in", f"{block}.image.modulation", "image",
                        (f"{block}.image.in",), lambda k: k[f"{block}.image.in"], SECOND_SHIFT)
        yield Entry(f"{block}.image_attention.out", block, "self-attention of the image tokens, with its own "
                    "projections", (f"{block}.image_attention.in",))
    for stream in kept[::-1]:
        yield from mlp(block, stream, second and stream == "image")


def mlp(block: str, stream: str, second: bool) -> Iterator[Entry]:
    """A stream after the attention: residual, MLP, residual."""
    name, attended, vectors = f"{block}.{stream}", f"{block}.attention.{stream}.out", f"{block}.{stream}.modulation"
    inputs = (f"{name}.in", attended, *((f"{block}.image_attention.out",) if second else ()))

    def x(k: Tensors) -> Tensor:
        x = k[f"{name}.in"] + part(k, vectors, GATE) * k[attended]
        return x + part(k, vectors, SECOND_GATE) * k[f"{block}.image_attention.out"] if second else x

    def ungated(k: Tensors) -> Tensor:
        x = m.normed(k[f"{name}.in"] + k[attended])
        return (1 + part(k, vectors, MLP_SCALE)) * x + part(k, vectors, MLP_SHIFT)

    what = f"{stream} + gate · attention" + " + second_gate · image_attention" * second
    yield modulated(block, f"{name}.mlp.in", vectors, what, inputs, x, MLP_SHIFT,
                    Cause("no gate after the attention", lambda k, own: ungated(k)))
    yield Entry(f"{name}.mlp.in_layer.out", block, "W x + b", (f"{name}.mlp.in",))
    yield gelu(block, f"{name}.mlp.activation.out", f"{name}.mlp.in_layer.out")
    yield Entry(f"{name}.mlp.out", block, "W x + b", (f"{name}.mlp.activation.out",))
    yield Entry(f"{name}.out", block, f"{what} + mlp_gate · MLP", (*inputs, vectors, f"{name}.mlp.out"), (
        Cause("no gate after the MLP", lambda k, own: x(k) + k[f"{name}.mlp.out"]),
        Cause("the attention's gate for the MLP", lambda k, own: x(k) + part(k, vectors, GATE) * k[f"{name}.mlp.out"]),
        Cause("the MLP added to the block's input: it is added to the sum after the attention",
              lambda k, own: k[f"{name}.in"] + part(k, vectors, MLP_GATE) * k[f"{name}.mlp.out"]),
    ))


def single_block(run: Run, i: int) -> Iterator[Entry]:
    block, r, dual = f"single.{i}", run.repulsion, run.transformer.num_dual_blocks
    if i:
        yield Entry(f"{block}.tokens.in", block, f"the output of single.{i - 1}", returned(run, "single.0.tokens"),
                    (BETWEEN,))
    else:
        yield Entry(f"{block}.tokens.in", block, "the context's tokens, then the image's", (
                    f"dual.{dual - 1}.context.out", f"dual.{dual - 1}.image.out"), (
            Cause("the image's tokens before the context's",
                  lambda k, own: own.roll(-k["context_in.out"].shape[1], 1)),
        ))
    yield modulation(block, f"{block}.modulation", 3)
    yield modulated(block, f"{block}.linear_in.in", f"{block}.modulation", "tokens", (f"{block}.tokens.in",),
                    lambda k: k[f"{block}.tokens.in"])
    yield from attention(run, block, (f"{block}.linear_in.in",))
    attended, activation, joined = f"{block}.attention.attended", f"{block}.activation.out", f"{block}.linear_out.in"
    if r.acts_in(dual + i, run.transformer.num_blocks) and r.single_stream_tokens != "none":
        yield from push(run, block, (attended,), "heads joined as (h k)", JOINED[:1])
        attended = f"{block}.repulsion.out"
    yield Entry(f"{block}.activation.in", block, "W x + b, the rows after q, k and v", (f"{block}.linear_in.in",))
    yield gelu(block, activation, f"{block}.activation.in")
    yield Entry(joined, block, "attention (heads joined as (h k)), then activation", (attended, activation), (
        Cause("the activation before the attention", lambda k, own: own.roll(k[activation].shape[-1], -1)),
        JOINED[0],
    ))
    yield Entry(f"{block}.tokens.out", block, "tokens + gate · (W x + b)", (
        f"{block}.tokens.in", f"{block}.modulation", joined), (Cause("the gate left out"),))
