"""The tensors of a push: the tokens before and after it, and the intermediate results of Eq. 2 and of its gradient."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .entry import Cause, Entry, Tensors
from .mistakes import Ratio, mixing_with
from .run import Run

DERIVATIVES = {  # f′(K̃) of each objective
    "vendi": "−V (1 + log λ) Vᵀ, V the eigenvectors of K̃", "dpp": "K̃⁻¹", "rke": "−2 K̃ / tr K̃²",
    "cosine": "−1 / (B − 1) everywhere",
}


def push(run: Run, block: str, inputs: tuple[str, ...], formula: str,
         causes: tuple[Cause, ...] = ()) -> Iterator[Entry]:
    """The tokens before and after the push of a block, whose `inputs` and `formula` give the tokens before it; for the
    first block that repels also the intermediate tensors."""
    r, stage, inside = run.repulsion, f"{block}.repulsion", block == f"dual.{run.pushed_block}"
    whose = "the samples of the last prompt" if r.branches == "conditional" else "each prompt's group of samples"
    if block.startswith("single") and r.single_stream_tokens == "context":
        whose += ", of their context tokens alone"
    before, out = f"{stage}.in", f"{stage}.out"
    yield Entry(before, stage, formula, inputs, causes)
    if inside:
        yield from gradient(run, stage, whose)
        yield mixing(run, stage)
    yield Entry(out, stage, f"C + E C for {whose}", (before, *((f"{stage}.mixing",) if inside else ())), (
        Cause("not pushed", lambda k, own: k[before]),
        Cause("pushed together: they are pushed apart", lambda k, own: 2 * k[before] - own),
        Cause(f"computed for others than {whose}"),
    ))


def gradient(run: Run, stage: str, whose: str) -> Iterator[Entry]:
    """From the tokens to the gradient of the objective H before the first step."""
    r, b, eps = run.repulsion, run.images, run.repulsion.kernel_reg
    before, gram, kernel, gradient = (f"{stage}.{name}" for name in ("in", "gram", "kernel", "gradient"))

    def values(k: Tensors, reg: float, trace: float) -> Tensor:
        return torch.linalg.eigvalsh((k[kernel] + reg * torch.eye(b, dtype=torch.float64)) / trace)

    def per_token(k: Tensors) -> Tensor:
        units = F.normalize(k[before][-len(k[gradient]) :], dim=-1).unflatten(0, (-1, b))
        return torch.einsum("gand,gbnd->gab", units, units) / units.shape[2]

    yield Entry(gram, stage, f"G = C Cᵀ in float64 for {whose}; row c_i of C holds the n · d values of a sample",
                (before,), (Cause(f"computed for others than {whose}"),))
    yield Entry(kernel, stage, "K_ij = r_i r_j G_ij, r_i = 1 / ‖c_i‖", (gram,), (
        Cause("not normalized", lambda k, own: k[gram]),
        Cause("the mean of the tokens' cosines: a sample is one vector", lambda k, own: per_token(k)),
    ))
    yield Entry(f"{stage}.spectrum", stage, f"eigenvalues λ of K̃ = (K + ε I) / (B (1 + ε)), ascending; ε = {eps:g}",
                (kernel,), (
        Cause("no ε", lambda k, own: values(k, 0, b)),
        Cause("not divided by the trace", lambda k, own: values(k, eps, 1)),
        Cause("descending: they ascend", lambda k, own: own.flip(-1)),
    ))
    formula = "c_i − the mean of its group = Σ_j D_ij c_j" if r.objective == "spread" else (
        "∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j; W = f′(K̃) / (B (1 + ε)), where W_ij = 0 for "
        f"i = j and for K_ij ≥ 1 − 1e-14; f′(K̃) = {DERIVATIVES[r.objective]}")
    yield Entry(gradient, stage, formula, (before, kernel), (
        Cause("the other sign: H is maximized", lambda k, own: -own),
        Cause("half of it: K_ij and K_ji both depend on c_i", lambda k, own: own / 2),
        Cause("K in float32: real kernels are close to all ones, and H depends on the difference"),
        Cause("the part along c_i left in: K does not depend on the length of c_i"),
    ))


def mixing(run: Run, stage: str) -> Entry:
    """E of all steps of a push, and the length of each step."""
    r, gram, m = run.repulsion, f"{stage}.gram", run.repulsion.iterations

    def result(ratio: Ratio, iterations: int = m) -> Callable[[Tensors, Tensor], Tensor]:
        return lambda k, own: mixing_with(k[gram], r, ratio, iterations)

    if r.strength is None:
        symbol, ratio, causes = "η", lambda g, n: 1.0, ()
        length = f"L = η / M, η = {r.scale:g}"
    else:
        symbol, ratio = "s", lambda g, n: np.sqrt(trace(g) / trace(n))
        length = (f"L = (s / M) ‖C‖ / ‖D A C‖ in each group, s = {r.strength:g}, with ‖C‖² = tr G of the tokens before "
                  "the first step and ‖D A C‖² = tr(D A G Aᵀ Dᵀ); L = 0 where the gradient is 0")
        causes = (
            Cause("the gradient not normalized: L = s / M", result(lambda g, n: 1.0)),
            Cause("‖C‖ of one sample: it is of the whole group", result(lambda g, n: ratio(g, n) / run.images**0.5)),
            Cause("both norms of each sample: they are of the whole group",
                  result(lambda g, n: (np.diagonal(g, 0, 1, 2) / np.diagonal(n, 0, 1, 2))[..., None] ** 0.5)),
            Cause("both norms of the whole batch: they are of each group",
                  result(lambda g, n: np.sqrt(trace(g).sum() / trace(n).sum()))),
        )
    if m > 1:
        causes = (
            *causes, Cause("all steps along the first gradient: it is computed anew in each step", result(ratio, 1)),
            Cause(f"each step {symbol}: it is {symbol} / M", result(lambda g, n: m * ratio(g, n))),
        )
    return Entry(f"{stage}.mixing", stage, f"E = A − I after M = {m} steps A ← A + L D A from A = I; D as in "
                 f"`{stage}.gradient`, computed anew in each step from the Gram matrix A G Aᵀ; {length}", (gram,),
                 (*causes, Cause(f"another number of steps: it is {m}")))


def trace(x: np.ndarray) -> np.ndarray:
    return np.trace(x, axis1=1, axis2=2)[:, None, None]
