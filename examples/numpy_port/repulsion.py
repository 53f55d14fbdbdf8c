"""Contextual repulsion (arXiv:2603.28762) in Gram space. Ours: repulsion/config.py, repel.py, solvers.py."""

import numpy as np

from .layers import Array

DEFAULTS = {"strength": None, "scale": None, "iterations": 1, "steps": 1, "start": 0, "blocks": "all",
            "branches": "all", "kernel_reg": 1e-4}
ONLY = {"objective": "vendi", "solver": "gram"}  # the project has others, this port does not


class Repulsion:
    def __init__(self, **settings):
        """Settings as in repulsion/config.py. Raises ValueError for those that this port does not support."""
        beyond = [key for key, value in settings.items() if key not in DEFAULTS and ONLY.get(key) != value]
        if beyond or (settings.get("scale") is None) == (settings.get("strength") is None):
            raise ValueError(f"this port supports a strength or a scale, {ONLY} and {', '.join(DEFAULTS)}: {settings} "
                             "is beyond it, use the project itself")
        self.__dict__.update(DEFAULTS | settings)

    def acts_in(self, block: int, blocks: int) -> bool:
        names = ("all", ("first", "middle", "last")[3 * block // blocks])
        return self.blocks in names if isinstance(self.blocks, str) else block in self.blocks

    def push(self, tokens: Array, groups: int, branches: int | None = None) -> tuple[Array, dict[str, Array]]:
        """The samples of each group apart: tokens (groups · B, n, d) → the same shape, and the intermediate tensors."""
        pushed = groups // (branches or groups) if self.branches == "conditional" else groups  # the last ones
        unchanged, moving = np.split(tokens, [len(tokens) // groups * (groups - pushed)])
        c = moving.reshape(pushed, len(moving) // pushed, -1).astype(np.float64)  # (g, B, n · d): a sample is a vector
        gram = c @ c.swapaxes(1, 2)
        mixing = np.stack([self.mixing(one) for one in gram])
        out = np.concatenate([unchanged, (c + mixing @ c).reshape(moving.shape).astype(tokens.dtype)])
        d, kernel, spectrum = map(np.stack, zip(*map(self.gradient, gram), strict=True))
        return out, {"in": tokens, "gram": gram, "kernel": kernel, "spectrum": spectrum,
                     "gradient": (d @ c).reshape(moving.shape), "mixing": mixing, "out": out}

    def mixing(self, gram: Array) -> Array:
        """Inner products G = C Cᵀ (B, B) → E (B, B): M gradient steps lead from C to A C = C + E C.

        Each step is A ← A + L D A. L is η / M, or such that a step is s / M times as long as C: L ‖D A C‖ = s / M ‖C‖.
        """
        a = np.eye(len(gram))
        for _ in range(self.iterations):
            step = self.gradient(a @ gram @ a.T)[0] @ a
            length = self.scale
            if self.strength is not None:
                squared, moved = np.trace(gram), np.trace(step @ gram @ step.T)  # ‖C‖², ‖D A C‖²
                zero = moved <= 1e-15 * np.square(step).max() * squared  # all samples coincide: rounding error alone
                length = 0 if zero else self.strength * np.sqrt(squared / moved)
            a = a + length / self.iterations * step
        return a - np.eye(len(gram))

    def gradient(self, gram: Array) -> tuple[Array, Array, Array]:
        """D with ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j; the kernel K; K̃'s eigenvalues λ.

        r_i = 1 / ‖c_i‖, K_ij = r_i r_j G_ij (Eq. 3), K̃ = (K + ε I) / (B (1 + ε)), H = −Σ λ log λ (Eq. 4), W = ∂H/∂K
        without its diagonal (K_ii is 1 whatever c_i is) and without pairs that coincide.
        """
        squared, identity = np.diag(gram), np.eye(len(gram))
        r = np.where(squared > 0, squared, np.inf) ** -0.5  # a zero vector has no direction
        kernel = gram * np.outer(r, r) * (1 - identity) + identity
        size = len(gram) * (1 + self.kernel_reg)
        eigenvalues, u = np.linalg.eigh((kernel + self.kernel_reg * identity) / size)
        w = -(u * (np.log(eigenvalues) + 1)) @ u.T / size * (kernel < 1 - 1e-14)
        d = 2 * (np.outer(r, r) * w - np.diag(r * r * (w * kernel).sum(axis=1)))
        return d, kernel, eigenvalues
