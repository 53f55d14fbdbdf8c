"""Skip-layer guidance, which SD3.5-medium may be sampled with besides the classifier-free one."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SkipLayerGuidance:
    """Lead away from what the model paints when some of its blocks are skipped: v ← v + scale · (v_cond − v_skipped).

    layers: the dual-stream blocks that are skipped
    scale: 0 or more; diffusers' default, where Stability's own program has 2.5
    start, stop: shares of the run, 0 to 1; it acts in step i of n (from 0) where start · n < i < stop · n, so never
    in the first step, and not at all in very short runs

    Source: Stability AI's sd3.5, `SkipLayerCFGDenoiser`. Raises ValueError naming the field that is out of range.
    """

    layers: tuple[int, ...] = (7, 8, 9)
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or any(not isinstance(i, int) or i < 0 for i in self.layers):
            raise ValueError(f"skip-layer guidance needs layers, indices from 0 on, got {self.layers}")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"skip-layer guidance's scale must be a finite number, 0 or more, got {self.scale}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError("skip-layer guidance's start and stop must be shares of the run, 0 ≤ start ≤ stop ≤ 1, "
                             f"got {self.start} and {self.stop}")

    def acts_in(self, step: int, steps: int) -> bool:
        """Whether step number `step` of `steps` is guided."""
        return self.start * steps < step < self.stop * steps

    def check_layers(self, num_dual_blocks: int) -> None:
        """Raises ValueError where `layers` names a block that the model does not have."""
        if max(self.layers) >= num_dual_blocks:
            raise ValueError(f"skip-layer guidance skips layer {max(self.layers)}, but this model's dual-stream blocks "
                             f"end at {num_dual_blocks - 1}")
