"""The velocity of a prompt: the transformer with classifier-free, distilled and skip-layer guidance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from einops import repeat
from torch import Tensor

from repulsion import Repulsion

from .parts import Part

# (samples, σ, step) → context and pooled vector (FLUX.2: None)
Condition = Callable[[int, float, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class SkipLayerGuidance:
    """Extrapolate away from the velocity of the model without some of its blocks: v ← v + scale · (v_cond − v_skipped).

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


@dataclass(frozen=True)
class GuidedVelocity:
    """v(x, σ, step) of a batch of one prompt, with guidance and repulsion.

    condition: (samples, σ, step) → context (g · samples, N, d) and pooled (g · samples, d): the samples of each prompt,
    those of the prompt to be followed last
    weight: w of classifier-free guidance, v_uncond + w (v_cond − v_uncond); None without
    distilled: the guidance that a guidance-distilled model takes as an input; None for others
    references: latents (1, c, H', W') of the pictures to edit (Kontext: one, FLUX.2)
    seed: that of the noise, for methods that draw more of it
    """

    transformer: Part
    condition: Condition
    steps: int
    weight: float | None = None
    distilled: float | None = None
    references: Sequence[Tensor] = ()
    repulsion: Repulsion | None = None
    skip_layers: SkipLayerGuidance | None = None
    seed: int = 0

    def __call__(self, x: Tensor, sigma: float, step: int, guided: bool = True) -> Tensor:
        """x (b, c, H, W) at σ → the velocity, float32. Without `guided`: of the prompt alone, without any guidance.

        The branches of classifier-free guidance are one batch of two groups, the unconditional one first; samples repel
        those of their own branch, so that guidance amplifies what sets the branches apart and not the push.
        """
        b, groups = len(x), 2 if guided and self.weight is not None else 1
        context, pooled = self.condition(b, sigma, step)
        repulsion = self.repulsion if self.repulsion is not None and self.repulsion.acts_at(step, sigma) else None

        def inputs(n: int) -> dict:
            """The model's, for the last n samples of all branches."""
            embedded = None if self.distilled is None else x.new_full((n,), self.distilled if guided else 1.0)
            return {"latent": repeat(x, "b ... -> (g b) ...", g=n // b), "sigma": x.new_full((n,), sigma),
                    "context": context[-n:], "pooled": None if pooled is None else pooled[-n:], "guidance": embedded,
                    "reference": [latent.expand(n, -1, -1, -1) for latent in self.references]}

        v = self.transformer.module(**inputs(groups * b), repulsion=repulsion, groups=groups).float()
        conditional = v[-b:]
        if groups == 2:
            v = v[:b] + self.weight * (conditional - v[:b])
        if guided and self.skip_layers is not None and self.skip_layers.acts_in(step, self.steps):
            skipped = self.transformer.module(**inputs(b), repulsion=repulsion, skip_layers=self.skip_layers.layers)
            v = v + self.skip_layers.scale * (conditional - skipped.float())
        return v
