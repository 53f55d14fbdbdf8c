"""Time: the noise levels σ from 1 (noise) to 0 (picture), and the sampling loop."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Velocity = Callable[..., Tensor]  # (x (b, c, H, W), σ, step, guided=True) → v (b, c, H, W)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ ← s σ / (1 + (s − 1) σ): more steps at high noise, for larger pictures (SD3 section 5.3.2); s > 0."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(image_tokens: int) -> float:
    """FLUX.1-dev's shift e^μ, where μ runs from 0.5 at 256 image tokens to 1.15 at 4,096 on a line."""
    return math.exp(0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256))


def sigmas(steps: int, *, shift: float = 1.0, image_tokens: int | None = None, spacing: str = "flux") -> Tensor:
    """The noise levels of a sampling run, from 1 down to 0: (steps + 1,) float32.

    FLUX.1-schnell: `sigmas(4)`. FLUX.1-dev: `sigmas(28, image_tokens=4096)`. SD3: `sigmas(28, shift=3.0,
    spacing="sd3")`, whose times are evenly spaced from 1 to the shifted 1/1000, then shifted, then 0: only the end
    point is shifted twice.
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


def denoise(velocity: Velocity, noise: Tensor, sigmas: Tensor, progress: str | None = None) -> Tensor:
    """Follow the velocity (noise − image) from noise to image with Euler steps: x ← x + (σ_next − σ) v(x, σ, step).

    noise (b, c, H, W) at σ = sigmas[0]; sigmas (steps + 1,), falling → (b, c, H, W) at sigmas[-1].
    `progress` names a progress bar.
    """
    x, levels = noise, sigmas.tolist()
    for step in tqdm(range(len(levels) - 1), desc=progress, disable=progress is None, leave=False):
        sigma, next_sigma = levels[step], levels[step + 1]
        x = x + (next_sigma - sigma) * velocity(x, sigma, step)
    return x


def starting_noise(seed: int, images: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (images, *shape), float32 on the CPU; that of image i depends on the seed and i alone."""
    noise = []
    for i in range(images):
        if seed < 2**32:
            generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + i) % 2**63)
            noise.append(torch.randn(shape, generator=generator, device="cpu"))
        else:  # torch's generator on the CPU reads 32 bits of its seed
            numbers = np.random.default_rng([seed, i]).standard_normal(shape, dtype=np.float32)
            noise.append(torch.from_numpy(numbers))
    return torch.stack(noise)
