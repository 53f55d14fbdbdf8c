"""Time: the noise levels σ from 1 (noise) to 0 (picture), and the sampling loop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Velocity = Callable[..., Tensor]  # (x (b, c, H, W), σ, step, guided=True) → v (b, c, H, W)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """σ ← s σ / (1 + (s − 1) σ): more steps at high noise, for larger pictures (SD3 section 5.3.2); s > 0."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a family: evenly spaced times, shifted towards high noise.

    spacing: "flux" and "flux2", times from 1 to 0 in equal parts; "sd3", from 1 to the shifted 1/1000 in equal parts,
    then 0, so that only the end point is shifted twice
    shift: above 0; None: e^μ, where μ runs from base_shift at base_image_seq_len image tokens to max_shift at
    max_image_seq_len on a line; with "flux2", that of `flux2_mu`

    The names are those of scheduler_config.json. Raises ValueError naming the field that is out of range.
    """

    spacing: Literal["flux", "flux2", "sd3"] = "flux"
    shift: float | None = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self):
        for name in ("shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"):
            value = getattr(self, name)
            if value is None and name == "shift":
                continue
            if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"the schedule's {name} must be a finite number above 0, got {value!r}")
        if self.spacing not in ("flux", "flux2", "sd3"):
            raise ValueError(f'spacing must be "flux", "flux2" or "sd3", got {self.spacing!r}')
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError("base_image_seq_len and max_image_seq_len must differ")

    @classmethod
    def from_hub(cls, config: Mapping[str, Any], spacing: Literal["flux", "flux2", "sd3"]) -> "Schedule":
        """The schedule of a scheduler_config.json. Raises ValueError for what would change the levels otherwise.

        FLUX.2's file has FLUX.1's shifts, which its programs do not use: they are checked and passed over.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"it describes a {name!s:.60}, not a FlowMatchEulerDiscreteScheduler: say the shift")
        for key, usual in OTHER_LEVELS.items():
            if config.get(key, usual) not in (usual, None):
                raise ValueError(f"{key} {config[key]!r:.60} is not supported: set it to {usual!r}, or say the shift")
        given = {f.name: config[f.name] for f in fields(cls) if f.name in config and f.name != "spacing"}
        given.setdefault("shift", 1.0)
        dynamic = config.get("use_dynamic_shifting", False)
        if given["shift"] is None or not isinstance(dynamic, bool):
            raise ValueError(f"shift {given['shift']!r} is no number, or use_dynamic_shifting {dynamic!r} not true or "
                             "false: download the file again")
        return cls(spacing, **given | ({"shift": None} if dynamic or spacing == "flux2" else {}))

    def shift_at(self, image_tokens: int | None, steps: int | None = None) -> float:
        """The shift for pictures of this size, in FLUX.2 sampled in so many steps."""
        if self.shift is not None:
            return self.shift
        if self.spacing == "flux2":
            return math.exp(flux2_mu(image_tokens, steps))
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return math.exp(self.base_shift + slope * (image_tokens - self.base_image_seq_len))

    def sigmas(self, steps: int, image_tokens: int | None = None) -> Tensor:
        """The noise levels of a run of `steps` for pictures of `image_tokens`, from 1 down to 0: (steps + 1,) float32.

        Raises ValueError for fewer than one step.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        shift, last = self.shift_at(image_tokens, steps), torch.tensor(1 / 1000, dtype=torch.float64)
        if self.shift is not None:
            last = shifted(last, shift)
        end = last.item() if self.spacing == "sd3" else 1 / steps
        levels = shifted(torch.linspace(1, end, steps, dtype=torch.float64), shift)
        return torch.cat([levels, levels.new_zeros(1)]).float()


# Entries of scheduler_config.json under which diffusers takes other levels, and the only value that is supported.
OTHER_LEVELS = {"num_train_timesteps": 1000, "invert_sigmas": False, "use_karras_sigmas": False,
                "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
                "time_shift_type": "exponential", "shift_terminal": None}


def flux2_mu(image_tokens: int, steps: int) -> float:
    """FLUX.2's shift is e^μ: in the picture's size, μ is a line for 10 steps and one for 200; between them and beyond
    it is linear in the steps. Above 4300 tokens (references are not counted) the line for 200 steps holds for all."""
    at_10, at_200 = 8.73809524e-5 * image_tokens + 1.89833333, 0.00016927 * image_tokens + 0.45666666
    return at_200 if image_tokens > 4300 else at_200 + (at_10 - at_200) * (200 - steps) / 190


def sigmas(steps: int, *, shift: float | None = None, image_tokens: int | None = None, spacing: str = "flux") -> Tensor:
    """The noise levels of a sampling run, from 1 down to 0: (steps + 1,) float32; see `Schedule`.

    FLUX.1-schnell: `sigmas(4)`. FLUX.1-dev: `sigmas(28, image_tokens=4096)`. FLUX.2: `sigmas(4, image_tokens=4096,
    spacing="flux2")`. SD3: `sigmas(28, shift=3.0, spacing="sd3")`. A `shift` holds for pictures of any size.
    Raises ValueError for fewer than one step, a shift that is not positive, and an unknown spacing.
    """
    return Schedule(spacing, 1.0 if shift is None and image_tokens is None else shift).sigmas(steps, image_tokens)


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
