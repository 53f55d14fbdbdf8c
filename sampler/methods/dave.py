"""DAVE: early in the run, less of the mean of all image tokens, which fixes the layout.

Kwon et al., "Breaking the Lock-in: Diversifying Text-to-Image Generation via Representation Modulation", ICML 2026,
arXiv:2606.06813. Our reading of the abstract and of second-hand reports: that block 1 is counted from 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .inside import Inside, Place, in_first


@dataclass(frozen=True)
class DAVE(Inside):
    """h ← h − a · mean of h over the image tokens, where they leave one early block, each sample by itself.

    strength: a; at 1 nothing of the mean is left (published for SD3: 0.5)
    block: the block, from 0
    share: of the steps, from the first on, at least one (published for SD3: 4 of 28)
    """

    strength: float = 0.5
    block: int = 1
    share: float = 1 / 7
    ranges: ClassVar = {"block": (0, math.inf), "share": (0, 1)}

    def blocks(self, count: int) -> tuple[int, ...]:
        return (self.block,)

    def acts_at(self, sigma: float, step: int, steps: int) -> bool:
        return in_first(self.share, step, steps)

    def change(self, image: Tensor, again: Callable[[Tensor], Tensor], place: Place) -> Tensor:
        return image - self.strength * image.mean(1, keepdim=True)
