"""Two ways to climb the diversity of a group: the paper's loop over the tokens, and the same loop in Gram space."""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernel import cosine_kernel
from .objectives import density_matrix

Objective = Callable[[Tensor], Tensor]
SAME = 1e-14  # samples whose cosine is this close to 1 coincide as far as float64 can tell
CLOSE = 1e-7  # how near H comes to what `diversity` asks, as a share of the rise
CHUNK = 1 << 18  # columns widened to float64 at a time


def ascend_autograd(vectors: Tensor, scale: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """The paper's loop, Eq. 2: M times c ← c + (η / M) ∂H/∂c, by automatic differentiation.

    vectors (g, B, D) → (g, B, D), in the dtype of its input. The kernel of real tokens is close to all ones, and H
    lives in the difference: in float32 the displacement is off by about 2e-3.
    """
    c = vectors.detach()
    for _ in range(iterations):
        c = c.clone().requires_grad_()
        diversity = objective(density_matrix(cosine_kernel(c), reg)).sum()
        (gradient,) = torch.autograd.grad(diversity, c)
        c = (c + scale / iterations * gradient).detach()
    return c


def ascend_gram(vectors: Tensor, scale: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """The same M steps without touching the tokens: vectors (g, B, D) → (g, B, D), float64 inside, dtype kept.

    H knows the vectors only through their inner products, and its gradient is a combination of the same B vectors.
    So M steps end at C + E C with a B × B matrix E, which follows from the Gram matrix G = C Cᵀ alone.
    """
    return mix(vectors, mixing_matrix(gram_matrix(vectors), scale, iterations, objective, reg))


def ascend_to(vectors: Tensor, share: float, iterations: int, objective: Objective, reg: float) -> Tensor:
    """As `ascend_gram`, but each group goes as far as raises its H by this share of what is left to the highest.

    The highest is H of samples all orthogonal, log B for the entropy. The M steps raise H by equal parts; each is as
    long along its gradient as that takes, found on B × B matrices (`step_length`).
    """
    return mix(vectors, mixing_matrix(gram_matrix(vectors), None, iterations, objective, reg, share))


def mix(vectors: Tensor, mixing: Tensor) -> Tensor:
    """C + E C, in float64 and rounded once: vectors (g, B, D), mixing (g, B, B) → (g, B, D)."""
    mixing = mixing.to(vectors.device)
    mixed = torch.empty_like(vectors)
    for source, target in zip(vectors.split(CHUNK, -1), mixed.split(CHUNK, -1), strict=True):
        wide = source.double()
        target.copy_(wide.baddbmm(mixing, wide))
    return mixed


def gram_matrix(vectors: Tensor) -> Tensor:
    """Inner products of every pair, summed in float64: vectors (g, B, D) → (g, B, B) on the CPU."""
    g, b, _ = vectors.shape
    gram = torch.zeros(g, b, b, dtype=torch.float64, device=vectors.device)
    for chunk in vectors.split(CHUNK, -1):
        wide = chunk.double()
        gram.baddbmm_(wide, wide.mT)
    return gram.cpu()


def mixing_matrix(gram: Tensor, scale: float | None, iterations: int, objective: Objective, reg: float,
                  share: float | None = None) -> Tensor:
    """M steps of Eq. 2 in Gram space: gram (g, B, B) float64 → E (g, B, B) with C_M = C + E C.

    With r_i = |c_i|⁻¹, K_ij = r_i r_j G_ij and W = ∂H/∂K (its diagonal 0, since K_ii is 1 whatever c_i is), the
    chain rule through the cosine gives ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j.
    The term of a pair that coincides is 0; it is left out, or its rounding error would grow with every step.
    With `share` the steps are as long as it asks (`ascend_to`), with `scale` all are η / M.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype)
    off_diagonal = 1 - identity
    mixing, start, highest = torch.zeros_like(gram), None, objective(identity / len(identity))

    def value_of(kernel: Tensor) -> Tensor:
        return objective(density_matrix(kernel, reg))

    for step in range(iterations):
        current = identity + mixing
        now = current @ gram @ current.mT
        kernel, r = cosines(now)
        kernel.requires_grad_()
        with torch.enable_grad():
            value = value_of(kernel)
            (w,) = torch.autograd.grad(value.sum(), kernel)
        w = w * off_diagonal * (kernel < 1 - SAME)
        outer = r[..., :, None] * r[..., None, :]
        d = 2 * (outer * w - torch.diag_embed(r.square() * (w * kernel.detach()).sum(-1)))
        if share is None:
            length = scale / iterations
        else:
            start = value.detach() if start is None else start
            goal = start + (step + 1) / iterations * share * (highest - start)
            groups = zip(now, d, value.tolist(), goal.tolist(), strict=True)
            length = gram.new_tensor([step_length(*group, value_of) for group in groups])[:, None, None]
        mixing = mixing + length * (d @ current)
    return mixing


def cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of a Gram matrix and r, one over the vectors' lengths; 0 for a zero vector, which pushes nobody."""
    squared = gram.diagonal(dim1=-2, dim2=-1)
    r = squared.rsqrt().nan_to_num_(posinf=0.0)
    kernel = gram * r[..., :, None] * r[..., None, :]
    kernel.diagonal(dim1=-2, dim2=-1).fill_(1)
    return kernel, r


def step_length(gram: Tensor, d: Tensor, value: float, goal: float, value_of: Objective) -> float:
    """How far one group goes along the gradient from H = value to goal: gram, d (B, B) → 0 or more.

    First half as far again as H's slope, Σ |∂H/∂c_i|², promises, or 1 / s where that is less, s the largest absolute
    row sum of D. This is halved until H is above where it started, then doubled until H is past the goal or its peak.
    Past the goal: false position (Illinois) until all but CLOSE of the way is gone. Past the peak: the last length
    before it. Where nothing moves, or the goal is behind: 0.
    """
    linear = d @ gram
    linear, square = linear + linear.mT, linear @ d.mT  # (I + L D) G (I + L D)ᵀ is G + L (linear + L square)
    gap_low, slope, speed = value - goal, square.trace().item(), d.abs().sum(-1).max().item()
    if gap_low >= 0 or not slope > 0:
        return 0.0

    def gap(length: float) -> float:
        moved = torch.add(gram, torch.add(linear, square, alpha=length), alpha=length)
        return value_of(cosines(moved)[0]).item() - goal

    low, high, was_above = 0.0, min(-1.5 * gap_low / slope, 1 / speed), None
    gap_high = gap(high)
    while gap_high <= gap_low and high * speed > SAME:
        high /= 2
        gap_high = gap(high)
    while gap_low < gap_high < 0:
        low, gap_low, high = high, gap_high, 2 * high
        gap_high = gap(high)
    for _ in range(50 if gap_high > 0 else 0):
        middle = low - gap_low * (high - low) / (gap_high - gap_low)
        gap_middle = gap(middle)
        if abs(gap_middle) <= CLOSE * (goal - value):
            return middle
        less = 0.5 if (gap_middle > 0) == was_above else 1.0  # an end kept twice counts half: it might stay
        if gap_middle > 0:
            high, gap_high, gap_low, was_above = middle, gap_middle, less * gap_low, True
        else:
            low, gap_low, gap_high, was_above = middle, gap_middle, less * gap_high, False
    return low
