"""Time: the noise levels σ from 1 (noise) to 0 (picture), and the Euler loop along them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ ← s σ / (1 + (s − 1) σ): more steps at high noise, for larger pictures (SD3 section 5.3.2); s > 0."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(image_tokens: int) -> float:
    """FLUX.1-dev's shift e^μ, where μ runs from 0.5 at 256 image tokens to 1.15 at 4,096 on a line."""
    return math.exp(0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256))


def sigmas(steps: int, *, shift: float = 1.0, image_tokens: int | None = None, spacing: str = "flux") -> Tensor:
    """The noise levels of a sampling run, from 1 down to 0: (steps + 1,) float32.

    FLUX.1-schnell: `sigmas(4)`. FLUX.1-dev: `sigmas(28, image_tokens=4096)`. SD3: `sigmas(28, shift=3.0,
    spacing="sd3")`, whose times run from 1 to the shifted 1/1000, are shifted once more, and end in 0.
    Raises ValueError for fewer than one step, a shift that is not positive, and an unknown spacing.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"the schedule's shift must be a finite number above 0, got {shift}")
    if spacing == "sd3":
        last = shifted(torch.tensor(1 / 1000, dtype=torch.float64), shift).item()
        times = torch.cat([torch.linspace(1, last, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    elif spacing == "flux":
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    else:
        raise ValueError(f'spacing must be "flux" or "sd3", got {spacing!r}')
    return shifted(times, shift if image_tokens is None else dynamic_shift(image_tokens)).float()


def euler(velocity: Callable[[Tensor, float, int], Tensor], noise: Tensor, sigmas: Tensor,
          progress: str | None = None, choose: Callable[[Tensor, int], Tensor | None] | None = None) -> Tensor:
    """Follow the velocity (noise − image) from noise to image: x ← x + (σ_next − σ) v(x, σ, step).

    noise (b, c, H, W) at σ = sigmas[0]; sigmas (steps + 1,), falling → (b, c, H, W) at sigmas[-1].
    `progress` names a progress bar. `choose` says after each step which samples go on: the pictures predicted in it,
    x̂₀ = x − σ v, and the number of steps left → indices, or None for all.
    """
    x, levels = noise, sigmas.tolist()
    for step in tqdm(range(len(levels) - 1), desc=progress, disable=progress is None, leave=False):
        v = velocity(x, levels[step], step)
        kept = None if choose is None else choose(x - levels[step] * v, len(levels) - 2 - step)
        x = x + (levels[step + 1] - levels[step]) * v
        x = x if kept is None else x[kept]
    return x


def starting_noise(seed: int, images: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (images, *shape), float32; that of image i depends on the seed and i alone."""
    noise = []
    for i in range(images):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise)
