"""Feature Self-Guidance: the image tokens of a batch are dispersed in one early block, which then runs on them again.

Bhat et al., "Don't Settle at the Mode! Mitigating Diversity Collapse in Pretrained Flow Models via Feature
Self-Guidance", ECCV 2026, arXiv:2606.27371. Our reading: a sample's tokens are one vector; the steps are normalized,
so that a strength means the same in every model (published: 30 steps of length 0.5); block 2 is counted from 0; the
block runs again with the text that entered it; τ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from repulsion.repel import gram_matrix
from repulsion.solvers import mixing_matrix

from .inside import Inside, Place


@dataclass(frozen=True)
class FeatureSelfGuidance(Inside):
    """Steps down log mean_{i≠j} exp(cos(h_i, h_j) / τ) to h′, then h ← (1 − β) h′ + β block(h′).

    The tokens depend on the batch through its B × B inner products alone, so that all steps run on these.

    strength: length of all steps together, over that of the group's tokens
    block: the block, from 0, whose tokens are moved
    until: acts at σ ≥ until
    mix: β, 0 to 1, which pulls the tokens back to what the block can produce
    iterations: the number of steps
    temperature: τ, above 0
    """

    strength: float = 0.25
    block: int = 2
    until: float = 0.8
    mix: float = 0.4
    iterations: int = 30
    temperature: float = 0.1
    ranges: ClassVar = {"block": (0, math.inf), "until": (0, 1), "mix": (0, 1), "iterations": (1, math.inf),
                        "temperature": (1e-3, math.inf)}

    def blocks(self, count: int) -> tuple[int, ...]:
        return (self.block,)

    def acts_at(self, sigma: float, step: int, steps: int) -> bool:
        return sigma >= self.until

    def change(self, image: Tensor, again: Callable[[Tensor], Tensor], place: Place) -> Tensor:
        if place.samples == 1:
            return image
        h = rearrange(image, "(g b) m d -> g b m d", b=place.samples)
        gram = gram_matrix(h.cpu() if h.device.type == "mps" else h)  # MPS has no float64
        objective = partial(dispersion_derivative, temperature=self.temperature)
        mixing, _ = mixing_matrix(gram, self.strength, None, self.iterations, objective, reg=0.0)
        pushed = torch.einsum("gij, gjmd -> gimd", torch.from_numpy(mixing).float().to(h.device), h.float())
        moved = rearrange(h + pushed, "g b m d -> (g b) m d").to(image.dtype)
        return (1 - self.mix) * moved + self.mix * again(moved)


def dispersion_derivative(density: np.ndarray, temperature: float) -> np.ndarray:
    """−∂/∂K̃ of log mean_{i≠j} exp(B K̃_ij / τ), the objective's f′ for `repulsion.solvers`: (g, B, B) → (g, B, B)."""
    b = density.shape[-1]
    weights = np.exp((b * density - 1) / temperature) * (1 - np.eye(b))
    return -b / temperature * weights / weights.sum((-2, -1), keepdims=True)
