"""Contextual repulsion (arXiv:2603.28762) in Gram space. Ours: repulsion/config.py, repel.py, solvers.py."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .layers import Tap


@dataclass(frozen=True)
class Repulsion:
    """Settings as in repulsion/config.py; objective, solver and single_stream_tokens are the defaults."""

    strength: float | None = None
    scale: float | None = None
    iterations: int = 1
    steps: int = 1
    start: int = 0
    blocks: str | tuple[int, ...] = "all"
    branches: str = "all"  # of which FLUX.1 has one
    kernel_reg: float = 1e-4

    def acts_in(self, block: int, blocks: int) -> bool:
        names = ("all", ("first", "middle", "last")[3 * block // blocks])
        return self.blocks in names if isinstance(self.blocks, str) else block in self.blocks

    def push(self, tokens: Array, groups: int, tap: Tap) -> Array:
        """The samples of each group apart: tokens (groups · B, n, d) → the same shape."""
        tokens = tap("in", tokens)
        c = tokens.reshape(groups, len(tokens) // groups, -1).astype(jnp.float64)  # a sample is one vector
        gram = tap("gram", c @ c.swapaxes(1, 2))
        d, kernel, eigenvalues = self.gradient(gram)
        tap("kernel", kernel), tap("spectrum", eigenvalues), tap("gradient", (d @ c).reshape(tokens.shape))
        mixing = tap("mixing", self.mixing(gram))
        return tap("out", (c + mixing @ c).reshape(tokens.shape).astype(tokens.dtype))

    def mixing(self, gram: Array) -> Array:
        """G = C Cᵀ (g, B, B) → E = A − I after M steps A ← A + L D A; L = η / M, or L ‖D A C‖ = s / M ‖C‖."""
        identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)

        def step(_: int, a: Array) -> Array:
            move, length = self.gradient(a @ gram @ a.swapaxes(1, 2))[0] @ a, self.scale
            if self.strength is not None:
                squared, moved = (jnp.trace(x, axis1=1, axis2=2) for x in (gram, move @ gram @ move.swapaxes(1, 2)))
                length = (self.strength * jnp.sqrt(squared / jnp.where(moved > 0, moved, jnp.inf)))[:, None, None]
            return a + length / self.iterations * move

        return jax.lax.fori_loop(0, self.iterations, step, jnp.broadcast_to(identity, gram.shape)) - identity

    def gradient(self, gram: Array) -> tuple[Array, Array, Array]:
        """D with ∂H/∂c_i = 2 r_i Σ_j W_ij (r_j c_j − K_ij r_i c_i) = Σ_j D_ij c_j, W = ∂H/∂K of pairs that do not
        coincide; the kernel K; and the eigenvalues of K̃ = (K + ε I) / (B (1 + ε))."""
        identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        r = jax.lax.rsqrt(jnp.diagonal(gram, axis1=1, axis2=2))
        outer, size = r[:, :, None] * r[:, None, :], len(identity) * (1 + self.kernel_reg)
        kernel = gram * outer * (1 - identity) + identity
        eigenvalues, u = jnp.linalg.eigh((kernel + self.kernel_reg * identity) / size)
        w = -(u * (jnp.log(eigenvalues) + 1)[:, None, :]) @ u.swapaxes(1, 2) / size * (kernel < 1 - 1e-14)
        return 2 * (outer * w - identity * (r * r * (w * kernel).sum(-1))[:, :, None]), kernel, eigenvalues
