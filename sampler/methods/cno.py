"""CNO: before sampling, the starting noises are optimized so that the first predicted pictures differ.

Kim et al., "Diverse Text-to-Image Generation via Contrastive Noise Optimization", ICLR 2026, arXiv:2510.03813. Our
reading: where γ stands in the loss (there it gives both terms the same range), normalized steps, each noise kept at
its length, the number of steps, τ and the window.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..schedule import Velocity, denoise
from .method import Method


@dataclass(frozen=True)
class CNO(Method):
    """Steps down Σ_i [γ log Σ_{j≠i} exp(cos(z_i, z_j) / τ) − cos(z_i, z_i⁰) / τ] on the noise.

    γ = 1 / (τ log(B − 1) + 1). z_i is the predicted picture x̂₀ = x − σ v, averaged over windows, and z_i⁰ that of the
    noise as it was drawn. v counts as a constant, so that nothing is propagated back through the transformer.

    strength: length of all steps together, over that of the noise
    iterations: the number of steps; each takes as long as a step of sampling
    temperature: τ, above 0
    window: side of the windows, in latents
    """

    strength: float = 0.3
    iterations: int = 3
    temperature: float = 0.1
    window: int = 2
    ranges: ClassVar = {"iterations": (1, math.inf), "temperature": (1e-3, math.inf), "window": (1, math.inf)}

    def denoise(self, velocity: Velocity, noise: Tensor, sigmas: Tensor, progress: str | None = None) -> Tensor:
        """The sampling loop, from optimized noise."""
        if self.strength > 0 and len(noise) > 1:
            noise = self.optimize(velocity, noise, sigmas[0].item())
        return denoise(velocity, noise, sigmas, progress)

    def optimize(self, velocity: Velocity, noise: Tensor, sigma: float) -> Tensor:
        """The noise (b, c, H, W) after all steps."""
        x, length, first = noise, noise.flatten(1).norm(dim=1)[:, None, None, None], None
        for _ in range(self.iterations):
            predicted = (x - sigma * velocity(x, sigma, 0)).cpu().double()  # where samples are alike, cosines need it
            first = predicted if first is None else first
            with torch.enable_grad():
                predicted = predicted.detach().requires_grad_()
                loss = contrastive(*(F.avg_pool2d(y, self.window, ceil_mode=True) for y in (predicted, first)),
                                   self.temperature)
                (gradient,) = torch.autograd.grad(loss, predicted)
            if not gradient.norm() * predicted.norm() > 1e-9:  # all coincide: no direction to leave in
                break
            x = x - self.strength / self.iterations * x.norm() * (gradient / gradient.norm()).float().to(x)
            x = x * length / x.flatten(1).norm(dim=1)[:, None, None, None]
        return x


def contrastive(z: Tensor, first: Tensor, temperature: float) -> Tensor:
    """The loss of predictions (b, …), b at least 2, which were `first` before any step."""
    z, first = (F.normalize(y.flatten(1), dim=1) for y in (z, first))
    others = (z @ z.mT / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    gamma = 1 / (temperature * math.log(len(z) - 1) + 1)
    return (gamma * others.logsumexp(1) - (z * first).sum(1) / temperature).sum()
