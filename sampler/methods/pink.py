"""Pink noise: a run starts from noise with more energy in low frequencies.

Harrington et al., arXiv:2601.00090, known to us from second-hand reports. Our reading: the exponent as strength, and
for the mean, whose frequency is 0, the lowest other one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .method import Method


@dataclass(frozen=True)
class PinkNoise(Method):
    """White noise filtered so that the power at frequency f is as f^−a; every number keeps mean 0 and variance 1.

    strength: a; 0 is white noise, 1 pink
    """

    strength: float = 0.4

    def noise(self, draw: Callable[[int], Tensor], images: int) -> Tensor:
        white = draw(images)
        return white if self.strength == 0 else pink(white, self.strength)


def pink(white: Tensor, exponent: float) -> Tensor:
    """White noise (…, H, W), float32 → noise of the same variance whose power is as f^−exponent."""
    amplitude = power(*white.shape[-2:], exponent).sqrt().to(white.device)
    return torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real


def power(height: int, width: int, exponent: float) -> Tensor:
    """f^−exponent on the frequencies of `torch.fft.fft2`, scaled to mean 1: (height, width)."""
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)).clamp(min=1 / max(height, width))
    return f**-exponent / (f**-exponent).mean()
