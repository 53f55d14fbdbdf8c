"""What a kit holds of the transformer's inside: the first and the last block of each kind, and one push."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit.position import rotate
from mmdit.trace import PARTS

from . import mistakes as m
from .entry import Cause, Entry, Tensors
from .run import Run

SHIFT, _, GATE, MLP_SHIFT, MLP_SCALE, MLP_GATE, SECOND_SHIFT, _, SECOND_GATE = range(len(PARTS))
HEADS = Cause("heads as (k h): they are (h k)", lambda k, own: m.transposed_heads(own))
LAYER = Cause("one stream's layer used for the other")
JOINED = (Cause("heads joined as (k h): they are (h k)"), LAYER)
BETWEEN = Cause("a block left out or run twice, or repulsion in another block")


def blocks(run: Run) -> Iterator[Entry]:
    dual, single = run.transformer.num_dual_blocks, run.transformer.num_single_blocks
    for i in range(dual):
        if i in (0, dual - 1):
            yield from dual_block(run, i)
        elif i == run.pushed_block:
            formula = f"the context's tokens of dual.{i}, from its {run.repulsion.site}"
            yield from push(run, f"dual.{i}", returned(run, "dual.0.context", "dual.0.image"), formula, (BETWEEN,))
    for i in sorted({0, single - 1} if single else ()):
        yield from single_block(run, i)


def returned(run: Run, *places: str) -> tuple[str, ...]:
    """What later blocks are computed from."""
    angles = ("dual.0.angles.in",) if run.transformer.position == "rope" else ()
    return (*(f"{place}.out" for place in places), "dual.0.vector.in", *angles)


def part(k: Tensors, place: str, index: int) -> Tensor:
    return k[f"{place}.modulation"][:, index, None]


def modulation(stage: str, place: str, count: int) -> Entry:
    swapped = Cause("scale before shift: the hub's files store SD3's last norm1_context so", lambda k, own: own.flip(1))
    return Entry(f"{place}.modulation", stage, f"({', '.join(PARTS[:count])}) = W SiLU(vector) + b",
                 ("dual.0.vector.in",), (
        *((swapped,) if count == 2 else ()),
        Cause("the layer's rows as (d parts): they are (parts d)", lambda k, own: own.mT.reshape(own.shape)),
        Cause("no SiLU before the layer"),
    ))


def modulated(stage: str, name: str, place: str, what: str, inputs: tuple[str, ...], x: Callable[[Tensors], Tensor],
              first: int = SHIFT, *causes: Cause) -> Entry:
    """An adaptive LayerNorm of x(k), by two parts of the modulation at `place`, `first` and the next."""
    def result(k: Tensors, shift: int = first, scale: int = first + 1, one: float = 1.0) -> Tensor:
        return (one + part(k, place, scale)) * m.normed(x(k)) + part(k, place, shift)

    formula = f"(1 + {PARTS[first + 1]}) · LayerNorm({what}, eps 1e-6) + {PARTS[first]}"
    return Entry(name, stage, formula, (*inputs, f"{place}.modulation"), (
        Cause("shift and scale swapped", lambda k, own: result(k, first + 1, first)),
        Cause("scale for 1 + scale", lambda k, own: result(k, one=0.0)),
        Cause("LayerNorm's eps (1e-6)"),
        *causes,
    ))


def attention(run: Run, block: str, inputs: tuple[str, ...]) -> Iterator[Entry]:
    """v first, which no norm and no rotation hides, then q, k and what is read."""
    place, config, angles = f"{block}.attention", run.transformer, "dual.0.angles.in"
    q, k_, v = (f"{place}.{name}" for name in "qkv")
    order = Cause("the image's tokens before the context's",
                  lambda k, own: own.roll(-k["context_in.out"].shape[1], 2))
    yield Entry(v, block, "W x + b, rows as (q/k/v h k); the context's tokens, then the image's", inputs, (
        HEADS, order, Cause("rows in another order: first all of q, then k, then v, each as (h k)"), LAYER,
    ))
    formula = "W x + b as in v" + ", RMSNorm over k (eps 1e-6)" * config.qk_norm
    causes = [Cause("the norm: left out, over all heads at once, its eps (1e-6), or the other stream's weight")]
    if config.position == "rope":
        formula += ", then pairs (2j, 2j + 1) turned by angle j of their token"
        inputs = (*inputs, angles)
        causes = [
            Cause("RoPE: pairs (j, j + k/2): they are neighbors", lambda k, own: m.halves(own, k[angles])),
            Cause("RoPE: turned the other way", lambda k, own: rotate(own, -2 * k[angles])),
            Cause("RoPE: not turned", lambda k, own: rotate(own, -k[angles])), *causes,
        ]
    for name in (q, k_):
        yield Entry(name, block, formula, inputs, (*causes, HEADS, order, LAYER))

    def attend(k: Tensors, **how) -> Tensor:
        return F.scaled_dot_product_attention(k[q], k[k_], k[v], **how)

    yield Entry(f"{place}.attended", block, "softmax(q kᵀ / √k) v, over all tokens of both streams", (q, k_, v), (
        Cause("no 1/√k in the scores", lambda k, own: attend(k, scale=1.0)),
        Cause("scores divided by k, not √k", lambda k, own: attend(k, scale=1 / own.shape[-1])),
        Cause("a causal mask: every token reads every other", lambda k, own: attend(k, is_causal=True)),
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
    kept = ("image",) if last else streams  # whose tokens anyone reads after the attention
    for stream in streams if i else ():
        yield Entry(f"{block}.{stream}.in", block, f"what dual.{i - 1} returns",
                    returned(run, "dual.0.context", "dual.0.image"), (BETWEEN,))
    for stream in streams:
        count = 2 if stream not in kept else 9 if second and stream == "image" else 6
        yield modulation(block, f"{block}.{stream}", count)
    for stream in streams:
        name = f"{block}.{stream}"
        yield modulated(block, f"{block}.attention.{stream}.in", name, stream, (f"{name}.in",),
                        lambda k, name=name: k[f"{name}.in"])
    yield from attention(run, block, tuple(f"{block}.attention.{stream}.in" for stream in streams))
    pushed = run.pushes(i) and run.repulsion.site
    for stream in kept:
        name, formula = f"{block}.attention.{stream}.out", f"heads joined as (h k), the {stream}'s tokens, W x + b"
        inputs = (f"{block}.attention.attended",)
        if stream == "context" and pushed == "attention":
            yield from push(run, block, inputs, formula, JOINED)
            yield Entry(name, f"{block}.repulsion", f"{block}.repulsion.out", (f"{block}.repulsion.out",))
        else:
            yield Entry(name, block, formula, inputs, JOINED)
    if second:
        yield modulated(block, f"{block}.image_attention.in", f"{block}.image", "image", (f"{block}.image.in",),
                        lambda k: k[f"{block}.image.in"], SECOND_SHIFT)
        yield Entry(f"{block}.image_attention.out", block, "the image attends to itself alone, with layers of its own",
                    (f"{block}.image_attention.in",))
    for stream in kept[::-1]:
        yield from mlp(run, block, stream, second and stream == "image", stream == "context" and pushed == "block")


def mlp(run: Run, block: str, stream: str, second: bool, pushed: bool) -> Iterator[Entry]:
    """A stream after the attention: residual, MLP, residual."""
    name, attended = f"{block}.{stream}", f"{block}.attention.{stream}.out"
    inputs = (f"{name}.in", attended, *((f"{block}.image_attention.out",) if second else ()))

    def x(k: Tensors) -> Tensor:
        x = k[f"{name}.in"] + part(k, name, GATE) * k[attended]
        return x + part(k, name, SECOND_GATE) * k[f"{block}.image_attention.out"] if second else x

    def ungated(k: Tensors) -> Tensor:
        x = m.normed(k[f"{name}.in"] + k[attended])
        return (1 + part(k, name, MLP_SCALE)) * x + part(k, name, MLP_SHIFT)

    what = f"{stream} + gate · attention" + " + second_gate · image_attention" * second
    yield modulated(block, f"{name}.mlp.in", name, what, inputs, x, MLP_SHIFT,
                    Cause("no gate after the attention", lambda k, own: ungated(k)))
    yield Entry(f"{name}.mlp.in_layer.out", block, "W x + b", (f"{name}.mlp.in",))
    yield gelu(block, f"{name}.mlp.activation.out", f"{name}.mlp.in_layer.out")
    yield Entry(f"{name}.mlp.out", block, "W x + b", (f"{name}.mlp.activation.out",))
    inputs, formula = (*inputs, f"{name}.modulation", f"{name}.mlp.out"), f"{what} + mlp_gate · MLP"
    causes = (
        Cause("no gate after the MLP", lambda k, own: x(k) + k[f"{name}.mlp.out"]),
        Cause("the attention's gate for the MLP", lambda k, own: x(k) + part(k, name, GATE) * k[f"{name}.mlp.out"]),
        Cause("the MLP's step from the block's input: it is from what the attention's step left",
              lambda k, own: k[f"{name}.in"] + part(k, name, MLP_GATE) * k[f"{name}.mlp.out"]),
    )
    if pushed:
        yield from push(run, block, inputs, formula, causes)
        yield Entry(f"{name}.out", f"{block}.repulsion", f"{block}.repulsion.out", (f"{block}.repulsion.out",))
    else:
        yield Entry(f"{name}.out", block, formula, inputs, causes)


def single_block(run: Run, i: int) -> Iterator[Entry]:
    block, r, dual = f"single.{i}", run.repulsion, run.transformer.num_dual_blocks
    if i:
        yield Entry(f"{block}.tokens.in", block, f"what single.{i - 1} returns", returned(run, "single.0.tokens"),
                    (BETWEEN,))
    else:
        yield Entry(f"{block}.tokens.in", block, "the context's tokens, then the image's", (
                    f"dual.{dual - 1}.context.out", f"dual.{dual - 1}.image.out"), (
            Cause("the image's tokens before the context's",
                  lambda k, own: own.roll(-k["context_in.out"].shape[1], 1)),
        ))
    yield modulation(block, block, 3)
    yield modulated(block, f"{block}.linear_in.in", block, "tokens", (f"{block}.tokens.in",),
                    lambda k: k[f"{block}.tokens.in"])
    yield from attention(run, block, (f"{block}.linear_in.in",))
    attended, activation, joined = f"{block}.attention.attended", f"{block}.activation.out", f"{block}.linear_out.in"
    pushed = r.site if r.acts_in(dual + i, run.transformer.num_blocks) and r.single_stream_tokens != "none" else None
    if pushed == "attention":
        yield from push(run, block, (attended,), "heads joined as (h k)", JOINED[:1])
        attended = f"{block}.repulsion.out"
    yield Entry(f"{block}.activation.in", block, "W x + b, the rows after q, k and v", (f"{block}.linear_in.in",))
    yield gelu(block, activation, f"{block}.activation.in")
    yield Entry(joined, block, "attention, heads joined as (h k), beside the activation", (attended, activation), (
        Cause("the activation before the attention", lambda k, own: own.roll(k[activation].shape[-1], -1)),
        JOINED[0],
    ))
    inputs, formula = (f"{block}.tokens.in", f"{block}.modulation", joined), "tokens + gate · (W x + b)"
    if pushed == "block":
        yield from push(run, block, inputs, formula)
        inputs, formula = (f"{block}.repulsion.out",), f"{block}.repulsion.out"
    yield Entry(f"{block}.tokens.out", block, formula, inputs, (Cause("the gate left out"),))


def push(run: Run, block: str, inputs: tuple[str, ...], formula: str,
         causes: tuple[Cause, ...] = ()) -> Iterator[Entry]:
    """The tokens before and after a push; in the first block that repels also what Eq. 2 computes between them."""
    r, stage, inside = run.repulsion, f"{block}.repulsion", block == f"dual.{run.pushed_block}"
    whose = "the samples of the last prompt alone" if r.branches == "conditional" else "each prompt's samples, a group"
    before, out = f"{stage}.in", f"{stage}.out"
    yield Entry(before, stage, formula, inputs, causes)
    if inside:
        yield from inside_push(run, stage, whose)
    yield Entry(out, stage, f"C + E C for {whose}", (before, *((f"{stage}.mixing",) if inside else ())), (
        Cause("not pushed", lambda k, own: k[before]),
        Cause("pushed together: they are pushed apart", lambda k, own: 2 * k[before] - own),
        Cause(f"other samples pushed: {whose}"),
    ))


def inside_push(run: Run, stage: str, whose: str) -> Iterator[Entry]:
    r, b, eps = run.repulsion, run.images, run.repulsion.kernel_reg
    before, gram, kernel, gradient = (f"{stage}.{name}" for name in ("in", "gram", "kernel", "gradient"))

    def values(k: Tensors, reg: float, trace: float) -> Tensor:
        return torch.linalg.eigvalsh((k[kernel] + reg * torch.eye(b, dtype=torch.float64)) / trace)

    def per_token(k: Tensors) -> Tensor:
        units = F.normalize(k[before][-len(k[gradient]) :], dim=-1).unflatten(0, (-1, b))
        return torch.einsum("gand,gbnd->gab", units, units) / units.shape[2]

    yield Entry(gram, stage, f"G = C Cᵀ in float64; C: {whose}, each one vector c of n · d numbers", (before,),
                (Cause(f"other samples: {whose}"),))
    yield Entry(kernel, stage, "K_ij = r_i r_j G_ij, r = 1 / ‖c‖", (gram,), (
        Cause("not normalized", lambda k, own: k[gram]),
        Cause("the mean of the tokens' cosines: a sample is one vector", lambda k, own: per_token(k)),
    ))
    yield Entry(f"{stage}.spectrum", stage, f"eigenvalues of (K + ε I) / (B (1 + ε)), ε = {eps:g}, rising", (kernel,), (
        Cause("no ε", lambda k, own: values(k, 0, b)),
        Cause("not divided by the trace", lambda k, own: values(k, eps, 1)),
        Cause("falling: they rise", lambda k, own: own.flip(-1)),
    ))
    w = "−V (1 + log λ) Vᵀ / (B (1 + ε))" if r.objective == "vendi" else f"∂H/∂K, H `objectives.{r.objective}`,"
    yield Entry(gradient, stage, f"∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i), W = {w} with 0 on the diagonal",
                (before, kernel), (
        Cause("the other sign: H is climbed", lambda k, own: -own),
        Cause("half of it: K_ij and K_ji both hold c_i", lambda k, own: own / 2),
        Cause("K in float32: real kernels are close to all ones, and H lives in the difference"),
        Cause("the part along c_i left in: the length of c_i changes nothing in K"),
    ))
    length = f"{r.scale:g} / {r.iterations}" if r.diversity is None else (
        f"by `solvers.step_length`, so that H rises by 1/{r.iterations} of {r.diversity:g} of what it lacked to log B")
    yield Entry(f"{stage}.mixing", stage, f"E after {r.iterations} steps from 0: E ← E + length · D (I + E), where D "
                f"(I + E) C is the gradient at C + E C; the length is {length}", (gram,), (
        Cause("the gradient not computed anew after each step"),
        Cause("another number of steps"),
        *((Cause("the length searched otherwise: where H peaks below its goal, it is the last one tried before"),)
          if r.diversity is not None else ()),
    ))
