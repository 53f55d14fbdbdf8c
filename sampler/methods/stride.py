"""STRIDE: noise that is smooth over the picture, along the principal components of the tokens, in the early blocks.

Yadav et al., "STRIDE: Training-Free Diversity Guidance via PCA-Directed Feature Perturbation in Single-Step Diffusion
Models", arXiv:2605.11494. Our reading: the first quarter of the blocks, fresh noise in each; 8 components, all with the
same share; the length; in models of many steps, the first fifth of these.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..schedule import starting_noise
from .inside import Inside, Place, in_first
from .pink import pink


@dataclass(frozen=True)
class STRIDE(Inside):
    """h ← h + L Σ_k n_k v_kᵀ: v_k principal components of a sample's image tokens, n_k pink noise on their grid.

    L makes the sum strength times as long as the tokens' deviation from their mean, for each sample. The noise of
    sample i depends on the seed, the step, the block and i alone.

    strength: that share
    depth: share of the blocks, from the first on, at least one
    share: of the steps, from the first on, at least one
    components: how many
    """

    strength: float = 0.35
    depth: float = 0.25
    share: float = 0.2
    components: int = 8
    ranges: ClassVar = {"depth": (0, 1), "share": (0, 1), "components": (1, math.inf)}

    def blocks(self, count: int) -> range:
        return range(max(1, round(self.depth * count)))

    def acts_at(self, sigma: float, step: int, steps: int) -> bool:
        return in_first(self.share, step, steps)

    def change(self, image: Tensor, again: Callable[[Tensor], Tensor], place: Place) -> Tensor:
        centered = image.float() - image.float().mean(1, keepdim=True)
        basis = principal_components(centered, min(self.components, *image.shape[1:]))
        seed = -1 - 10_000 * place.seed - 100 * place.step - place.block  # below 0: not a picture's noise
        fields = starting_noise(seed, place.samples, (basis.shape[-1], place.rows, place.columns))
        fields = pink(fields, 1.0).flatten(2).mT.to(image.device)
        noise = fields.repeat(len(image) // place.samples, 1, 1) @ basis.mT
        length = self.strength * norm(centered) / norm(noise)
        return image + (length * noise).to(image.dtype)


def norm(tokens: Tensor) -> Tensor:
    """The length of each sample: (b, m, d) → (b, 1, 1)."""
    return tokens.flatten(1).norm(dim=1)[:, None, None]


def principal_components(centered: Tensor, count: int, rounds: int = 10) -> Tensor:
    """An orthonormal basis of the `count` first principal components: (b, m, d) → (b, d, count), by subspace
    iteration from tokens that are spread over the picture."""
    basis = centered[:, torch.linspace(0, centered.shape[1] - 1, count).long()].mT
    for _ in range(rounds):
        basis = torch.linalg.qr(centered.mT @ (centered @ basis)).Q
    return basis
