"""First step from the teacher: the undistilled model takes the first step, the few-step model the rest.

Gandikota and Bau, "Distilling Diversity and Control in Diffusion Models", WACV 2026, arXiv:2503.10637. Our reading: the
teacher covers the first interval of the few-step schedule, with its own guidance, in one Euler step or several.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..guidance import GuidedVelocity
from ..schedule import Velocity, denoise
from .method import Method


@dataclass(frozen=True)
class TeacherFirst(Method):
    """x(σ₁) from x(σ₀) along the teacher's velocity, then on along the few-step model's.

    The teacher reads the same context: the two models share their text encoders. It stays in memory beside the other.

    strength: the number of Euler steps in which the teacher goes from σ₀ to σ₁, rounded
    teacher: bundled checkpoint, folder, file or hub name
    weight: the teacher's guidance; None: its default

    Raises ValueError in a call with guidance, which few-step models have not, and for a teacher of other latents
    or another context.
    """

    strength: float = 4.0
    teacher: str = "tiny-sd3"
    weight: float | None = None

    def check(self, guided: bool) -> None:
        if guided:
            raise ValueError("TeacherFirst is for few-step models, which have no guidance: load one, such as "
                             "tiny-turbo, and leave guidance out")

    def velocity(self, velocity: GuidedVelocity, sigmas: Tensor) -> Velocity:
        count, (start, end) = round(self.strength), sigmas[:2].tolist()

        def hybrid(x: Tensor, sigma: float, step: int) -> Tensor:
            if step > 0 or count == 0:
                return velocity(x, sigma, step)
            taught = self.of_teacher(velocity, x)
            after = denoise(lambda y, sigma, _: taught(y, sigma, 0), x, torch.linspace(start, end, count + 1))
            return (after - x) / (end - start)

        return hybrid

    def of_teacher(self, velocity: GuidedVelocity, x: Tensor) -> GuidedVelocity:
        """The teacher's guided velocity, for the prompt and references of the student's."""
        teacher = load(self.teacher, str(x.device), velocity.transformer.module.image_in.weight.dtype)
        student = velocity.transformer.module.config
        for name in ("latent_channels", "context_dim", "pooled_dim"):
            its, wanted = getattr(teacher.config, name), getattr(student, name)
            if its != wanted:
                raise ValueError(f"the teacher {self.teacher} has {name} {its}, this model {wanted}: give the model "
                                 "that this one was distilled from, TeacherFirst(teacher=…)")
        guidance = teacher.defaults.guidance if self.weight is None else self.weight
        weight = teacher._classifier_free(guidance=guidance, true_guidance=None, negative_prompt=None, skip=None)
        empty = None if weight is None else teacher.text("")

        def condition(samples: int, sigma: float, step: int) -> tuple[Tensor, Tensor | None]:
            texts = velocity.condition(samples, sigma, step)
            if empty is None:
                return texts
            return tuple(None if y is None else torch.cat([e.to(y).expand_as(y), y])
                         for e, y in zip(empty, texts, strict=True))

        return replace(velocity, transformer=teacher.parts["transformer"], condition=condition, weight=weight,
                       distilled=guidance if teacher.config.guidance_embedding else None)


@lru_cache(maxsize=1)
def load(name: str, device: str, dtype: torch.dtype):
    """The teacher's pipeline, which computes in the few-step model's dtype, kept for the next call."""
    from ..pipeline import Pipeline  # which imports this module

    return Pipeline.load(name, dtype, device)
