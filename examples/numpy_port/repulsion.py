"""Contextual repulsion (arXiv:2603.28762) in Gram space. Ours: repulsion/config.py, repel.py, solvers.py."""

import math

import numpy as np

from .layers import Array

DEFAULTS = {"scale": None, "diversity": None, "iterations": 50, "steps": 1, "start": 0, "blocks": "all",
            "site": "attention", "branches": "all", "kernel_reg": 1e-4}
ONLY = {"tokens": "context", "objective": "vendi", "solver": "gram"}  # what else there is, this port does not do


class Repulsion:
    def __init__(self, **settings):
        """Settings as in repulsion/config.py. Raises ValueError for those that this port does not do."""
        beyond = [key for key, value in settings.items() if key not in DEFAULTS and ONLY.get(key) != value]
        if beyond or (settings.get("scale") is None) == (settings.get("diversity") is None):
            raise ValueError(f"this port repels by a scale or a diversity and {ONLY}, and knows {', '.join(DEFAULTS)}: "
                             f"{settings} is beyond it, use the project itself")
        self.__dict__.update(DEFAULTS | settings)

    def acts_in(self, block: int, blocks: int) -> bool:
        names = ("all", ("first", "middle", "last")[3 * block // blocks])
        return self.blocks in names if isinstance(self.blocks, str) else block in self.blocks

    def push(self, tokens: Array, groups: int) -> tuple[Array, dict[str, Array]]:
        """Tokens (groups · B, N, D) → the same shape, the samples of each group apart; and how it came about."""
        pushed = 1 if self.branches == "conditional" else groups  # the last group is the conditional branch
        still, moving = np.split(tokens, [len(tokens) // groups * (groups - pushed)])
        c = moving.reshape(pushed, len(moving) // pushed, -1).astype(np.float64)  # (g, B, N · D): a sample is a vector
        gram = c @ c.swapaxes(1, 2)
        mixing = np.stack([self.mixing(one) for one in gram])
        out = np.concatenate([still, (c + mixing @ c).reshape(moving.shape).astype(tokens.dtype)])
        d, _, kernel, spectrum = map(np.stack, zip(*map(self.climb, gram), strict=True))
        return out, {"in": tokens, "gram": gram, "kernel": kernel, "spectrum": spectrum,
                     "gradient": (d @ c).reshape(moving.shape), "mixing": mixing, "out": out}

    def mixing(self, gram: Array) -> Array:
        """M steps c ← c + length · ∂H/∂c, all on inner products C Cᵀ (B, B) → E (B, B): they end at C + E C."""
        identity, e, h_start = np.eye(len(gram)), np.zeros_like(gram), None
        for step in range(1, self.iterations + 1):
            now = (identity + e) @ gram @ (identity + e).T
            d, h, _, _ = self.climb(now)
            if self.diversity is None:
                length = self.scale / self.iterations
            else:  # as long as raises H by its part of what is left to the highest, log B
                h_start = h if h_start is None else h_start
                part = self.diversity * (math.log(len(gram)) - h_start) / self.iterations
                length = self.step_length(now, d, h, h_start + step * part)
            e = e + length * d @ (identity + e)
        return e

    def climb(self, gram: Array) -> tuple[Array, float, Array, Array]:
        """D with ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j; H; the kernel K; K̃'s eigenvalues λ.

        r is one over the vectors' lengths, K_ij = r_i r_j G_ij (Eq. 3), K̃ = (K + ε I) / (B (1 + ε)), H = −Σ λ log λ
        (Eq. 4), W = ∂H/∂K without its diagonal (K_ii is 1 whatever c_i is) and without pairs that coincide.
        """
        squared, identity = np.diag(gram), np.eye(len(gram))
        r = np.where(squared > 0, squared, np.inf) ** -0.5  # a zero vector has no direction
        kernel = gram * np.outer(r, r) * (1 - identity) + identity
        size = len(gram) * (1 + self.kernel_reg)
        eigenvalues, u = np.linalg.eigh((kernel + self.kernel_reg * identity) / size)
        w = -(u * (np.log(eigenvalues) + 1)) @ u.T / size * (1 - identity) * (kernel < 1 - 1e-14)
        d = 2 * (np.outer(r, r) * w - np.diag(r * r * (w * kernel).sum(axis=1)))
        return d, -(eigenvalues * np.log(eigenvalues)).sum(), kernel, eigenvalues

    def step_length(self, gram: Array, d: Array, h: float, goal: float) -> float:
        """How far along the gradient until H has risen from h to the goal: a guess from its slope, halved until H
        rises, doubled until past the goal, then false position (Illinois) to 1e-7. Past its peak, the length before."""
        def gap(length: float) -> float:
            moved = np.eye(len(gram)) + length * d
            return self.climb(moved @ gram @ moved.T)[1] - goal

        slope, speed = np.trace(d @ gram @ d.T), np.abs(d).sum(axis=1).max()
        if h >= goal or not slope > 0:
            return 0.0
        low, gap_low, high, was_above = 0.0, h - goal, min(1.5 * (goal - h) / slope, 1 / speed), None
        gap_high = gap(high)
        while gap_high <= gap_low and high * speed > 1e-14:
            high, gap_high = high / 2, gap(high / 2)
        while gap_low < gap_high < 0:
            low, gap_low, high, gap_high = high, gap_high, 2 * high, gap(2 * high)
        for _ in range(50 if gap_high > 0 else 0):
            middle = low - gap_low * (high - low) / (gap_high - gap_low)
            gap_middle = gap(middle)
            if abs(gap_middle) <= 1e-7 * (goal - h):
                return middle
            less = 0.5 if (gap_middle > 0) == was_above else 1  # an end that stays twice counts half
            if gap_middle > 0:
                high, gap_high, gap_low, was_above = middle, gap_middle, less * gap_low, True
            else:
                low, gap_low, gap_high, was_above = middle, gap_middle, less * gap_high, False
        return low
