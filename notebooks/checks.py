"""Checks of the exercises: each prints "passes", or "not yet: " and what is wrong.

A check takes the function that you wrote. What it compares with is in sight here, so read it after you have tried.
"""

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch.nn import functional as F

from mmdit import MMDiTConfig
from mmdit.blocks import DualBlock
from mmdit.position import grid_positions, rope_angles, rotate
from repulsion import cosine_kernel, repel, vendi_score, von_neumann_entropy
from repulsion.objectives import density_matrix
from sampler import denoise, sigmas
from sampler.schedule import shifted


class NotYet(Exception):
    """What is wrong with an answer."""


def need(right: bool, otherwise: str) -> None:
    if not right:
        raise NotYet(otherwise)


def close(found, wanted, tolerance: float = 1e-4) -> bool:
    """Whether numbers or tensors have the same shape and agree, relative to the size of the wanted ones."""
    found, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (found, wanted))
    return found.shape == wanted.shape and bool((found - wanted).norm() <= tolerance * max(wanted.norm(), 1e-3))


def check(test: Callable) -> Callable[[Callable | None], bool]:
    """The check that prints what `test` finds, and returns whether it passes; `test` raises NotYet."""

    @wraps(test)
    def printed(answer) -> bool:
        def given(*arguments):
            found = answer(*arguments)
            need(found is not None, "your function returns None: replace None in it, or add the missing return")
            return found

        torch.manual_seed(0)
        try:
            need(answer is not None, "replace None by your function")
            with torch.no_grad():
                test(given)
            said = "passes"
        except NotYet as wrong:
            said = f"not yet: {wrong}"
        except Exception as error:  # the reader's function fails: the message is the answer
            said = f"not yet: your function raises {type(error).__name__}: {error}"
        print(said)
        return said == "passes"

    return printed


# Notebook 1


@check
def ends_of_line(answer):
    x0, n = torch.randn(2, 6, 4, 4)
    ends = answer(0.7 * x0 + 0.3 * n, 0.3, n - x0)
    need(isinstance(ends, tuple) and len(ends) == 2, "return two things: the picture and the noise")
    need(not (close(ends[0], n) and close(ends[1], x0)), "the picture comes first, then the noise")
    need(close(ends[0], x0), "the picture is wrong: from x the way to σ = 0 is −σ v")
    need(close(ends[1], n), "the noise is wrong: from x the way to σ = 1 is (1 − σ) v")


@check
def same_ratio(answer):
    need(close(answer(0.3, 1), 0.3), "for r = 1 both pictures are the same, and σ' has to be σ")
    need(answer(0.5, 4) > 0.5, "averaging hides less: the larger picture needs a higher level")
    levels = torch.linspace(0.05, 0.95, 19)
    need(close(answer(levels, 4), shifted(levels, 4)), "the ratio σ' / (1 − σ') has to be r times σ / (1 − σ)")


@check
def velocity_of_one(answer):
    only, noise = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 4, 4)
    v = answer(noise, 1.0, only)
    need(not close(v, only - noise), "the sign is wrong: the velocity points from the picture to the noise")
    need(close(v, noise - only), "at σ = 1, where x is the noise, the velocity is n − x₀")
    need(close(answer(0.5 * only + 0.5 * noise, 0.5, only), noise - only),
         "right at σ = 1 only: the velocity is the same along the whole line")
    for steps in (1, 3, 20):  # one step is enough
        end = denoise(lambda x, sigma, step: answer(x, sigma, only), noise, sigmas(steps))
        need(close(end, only.expand_as(noise)), f"{steps} steps of Euler's method do not end at the picture")


# Notebook 2


@check
def shuffled(answer):
    config = MMDiTConfig(hidden_size=16, num_heads=2, num_dual_blocks=2, position="table")
    block = DualBlock(config, 0).double()
    context, image, vector = (torch.randn(1, size, 16, dtype=torch.float64) for size in (3, 6, 1))
    order = torch.randperm(6)
    wanted = block(context, image[:, order], vector[:, 0])
    found = answer(*block(context, image, vector[:, 0]), order)
    need(isinstance(found, tuple) and len(found) == 2, "return two things: the context and the image")
    need(close(found[0], wanted[0]), "the context is wrong: a sum over tokens does not depend on their order")
    need(close(found[1], wanted[1]), "the image is wrong: each token keeps its result, in its new place")


@check
def rope_score(answer):
    angles = rope_angles(grid_positions(0, 5, 5), axes=(8, 12, 12), theta=10_000)
    rope = torch.stack([angles.cos(), angles.sin()]).float()
    q, k = torch.randn(2, 32)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 25, 32), rope)[0, 0] for x in (q, k))
    wanted = torch.stack([rotated_q[3] @ rotated_k[t] for t in range(25)])
    found = torch.stack([torch.as_tensor(answer(q, k, angles[3], angles[t])) for t in range(25)])
    need(not found.is_complex(), "a score is a real number: take the real part")
    need(close(found[3], q @ k), "at the same position nothing is rotated, and the score is q · k (is q conjugated?)")
    need(close(found, wanted), "the key is rotated by its own angle and the query by its own: e^{i (t − s)}")


@check
def masked_attention(answer):
    q, k, v = torch.randn(3, 2, 2, 7, 4)  # n = 3 context tokens, then 4 image tokens
    wanted = F.scaled_dot_product_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3])
    found = answer(q, k, v, 3)
    need(found.shape == wanted.shape, f"return the context's rows alone, {tuple(wanted.shape)}")
    image = v.clone()
    image[:, :, 3:] += 1
    need(close(found, answer(q, k, image, 3)), "the result still depends on the image's values")
    need(close(found, wanted), "each row of weights has to sum to 1: mask the logits, not the weights")


# Notebook 3


@check
def vendi_of_typical(answer):
    for B, same in ((8, 8), (8, 1), (8, 6), (64, 38)):
        vectors = torch.eye(B)
        vectors[:same] = vectors[0]
        wanted = vendi_score(vectors)
        need(close(answer(B, same / B), wanted, 1e-3), f"for B = {B} and p = {same}/{B} the score is {wanted:.3g}")


@check
def score(answer):
    x, v = torch.randn(2, 16, 2)
    need(not close(answer(x, v, 0.6), (x + 0.4 * v) / 0.6), "the sign is wrong: the score points away from the noise")
    need(not close(answer(x, v, 0.6), -(x + 0.4 * v)), "divide by σ")
    need(close(answer(x, v, 0.6), -(x + 0.4 * v) / 0.6), "the score is −E[n | x] / σ, and n = x + (1 − σ) v")


@check
def weight_for(answer):
    need(close(answer(0.6, 8.0, 0.6), 1.0), "the share that is there already needs w = 1")
    w = answer(0.6, 8.0, 0.9)
    odds = 0.6 / 0.4 * 8.0 ** (w - 1)
    need(close(odds / (1 + odds), 0.9), f"with this w the share of red is {odds / (1 + odds):.2f} and not 0.9: the "
         "power w − 1 multiplies the odds q / (1 − q), not the share")


# Notebook 4


@check
def entropy_of_equals(answer):
    need(close(answer(8, 0.0), math.log(8)), "for c = 0 all are orthogonal, and H is log B")
    for c in (0.3, 0.99):
        kernel = torch.full((8, 8), c, dtype=torch.float64).fill_diagonal_(1)
        need(close(answer(8, c), von_neumann_entropy(kernel)),
             f"wrong for B = 8 and c = {c}: one eigenvalue of K / B is (1 + (B − 1) c) / B, the others are equal")


@check
def vendi_of_clusters(answer):
    need(close(answer(torch.tensor([8, 8, 8, 8])), 4.0), "four clusters of one size are four different pictures")
    wanted = vendi_score(torch.eye(3)[[0, 0, 0, 0, 1, 1, 2]])
    need(close(answer(torch.tensor([4, 2, 1])), wanted), f"clusters of 4, 2 and 1 have the score {wanted:.3g}")


@check
def length_halfway(answer):
    need(close(answer(torch.tensor(1.0)), 1.0), "for c = 1 the points are the same")
    need(close(answer(torch.tensor(0.0)), math.sqrt(0.5)), "for c = 0, at a right angle, the length is √½")
    need(close(answer(torch.tensor(0.5)), math.sqrt(0.75)), "|a + b|² / 4 is not what you have for c = 0.5")


# Notebook 5


@check
def slope_of_equals(answer):
    for c in (0.0, 0.3, 0.99):
        at, identity = torch.tensor(c, dtype=torch.float64, requires_grad=True), torch.eye(8, dtype=torch.float64)
        with torch.enable_grad():
            (wanted,) = torch.autograd.grad(von_neumann_entropy(identity + at * (1 - identity)), at)
        need(not (c and close(answer(8, c), -wanted)), "the sign is wrong: H falls as the samples become similar")
        need(close(answer(8, c), wanted), f"for B = 8 and c = {c} it is {wanted:.3g}")


@check
def same_effect(answer):
    c = torch.randn(4, 1, 50, dtype=torch.float64) + 3
    for a in (0.01, 30.0):
        wanted = a * repel(c, 100.0, 10)
        need(close(repel(a * c, answer(100.0, a), 10), wanted, 1e-6), f"for a = {a} the push has another length: the "
             "gradient is 1/a of what it was, and the push has to be a times as long")


@check
def step_of_renyi(answer):
    c = torch.randn(5, 60, dtype=torch.float64) + 1
    wanted = repel(c[:, None], 50.0, 1, objective="rke")[:, 0] - c
    found = answer(c, 50.0) - c
    need(not close(found, -wanted, 1e-3), "the sign is wrong: H₂ is minus a logarithm")
    ratio = (found * wanted).sum() / wanted.square().sum()
    need(not close(found, ratio * wanted, 1e-3) or abs(ratio - 1) < 1e-3,
         f"the direction is right and the length {ratio:.3g} times what it should be")
    need(close(found, wanted, 1e-3), "W is −2 K̃ / tr K̃², times the derivative of K̃ with respect to K")


@check
def factor_of_sum(answer):
    angle = torch.tensor([0.6, 1.1], dtype=torch.float64)
    pair = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    kernel = cosine_kernel(pair).requires_grad_()
    with torch.enable_grad():
        eigenvalues = torch.linalg.eigvalsh(density_matrix(kernel, torch.eye(2), 1e-4))
        (W,) = torch.autograd.grad(torch.special.entr(eigenvalues).sum(), kernel)
    after = repel(pair[:, None], 2.0, 1)[:, 0]
    found = answer(W[0, 1], 1 / 3, kernel[0, 1].detach(), 2.0)
    need(found < 1, "the sum becomes shorter: w is below 0")
    need(close(after.sum(dim=0), found * pair.sum(dim=0)), "the two gradients sum to 2 r² w (1 − k) (c₁ + c₂)")
