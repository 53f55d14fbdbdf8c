"""`Run`: the call of a pipeline that a kit records."""

from dataclasses import dataclass
from typing import Any

from mmdit import AutoencoderConfig, MMDiTConfig
from repulsion import Repulsion
from sampler import Pipeline


@dataclass(frozen=True)
class Run:
    """One call of a pipeline with repulsion, with all sizes and settings that a port needs beside the weights."""

    model: str
    prompts: tuple[str, ...]  # one for each branch: with classifier-free guidance the negative one first
    images: int
    steps: int
    seed: int
    guidance: float | None
    height: int
    width: int
    shift: float | None  # of the schedule; None: by picture size
    encoders: tuple[str, ...]
    transformer: MMDiTConfig
    autoencoder: AutoencoderConfig
    repulsion: Repulsion

    @classmethod
    def of(cls, pipeline: Pipeline, model: str, prompt: str, images: int = 2, steps: int | None = None,
           seed: int = 0) -> "Run":
        """The call with the checkpoint's defaults; with repulsion of strength 1 where they have none.

        Raises ValueError for a call without repulsion: too few images or steps.
        """
        defaults, text = pipeline.defaults, pipeline.text
        steps = defaults.steps if steps is None else steps
        repulsion = defaults.repulsion or Repulsion(strength=1.0)
        if images < 2:
            raise ValueError(f"a kit needs at least 2 images, which repel each other, got {images}")
        if steps <= repulsion.start:
            raise ValueError(f"a kit of this checkpoint needs at least {repulsion.start + 1} steps, since repulsion "
                             f"starts after {repulsion.start}, got {steps}")
        guided = text.family == "sd3" and defaults.guidance is not None and defaults.guidance > 1
        encoders = (*("clip_l", "clip_g")[: len(text.clips)], *(() if text.t5 is None else ("t5",)))
        return cls(model, ("", prompt) if guided else (prompt,), images, steps, seed, defaults.guidance,
                   defaults.height, defaults.width, pipeline.schedule.shift, encoders, pipeline.config,
                   pipeline.autoencoder.config, repulsion)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Run":
        """The inverse of `asdict` and JSON."""
        kinds = {"transformer": MMDiTConfig, "autoencoder": AutoencoderConfig, "repulsion": Repulsion}

        def made(value: Any, kind: Any = None) -> Any:
            if isinstance(value, dict):
                return kind(**{name: made(field, kinds.get(name)) for name, field in value.items()})
            return tuple(value) if isinstance(value, list) else value

        return made(found, cls)

    @property
    def step(self) -> int:
        """The step whose transformer pass is in the kit: the first that repels."""
        return self.repulsion.start

    def pushes(self, i: int) -> bool:
        """Whether the attention of dual-stream block `i` pushes its context output."""
        config = self.transformer
        ends = config.context_ends_early and i == config.num_dual_blocks - 1
        return not ends and self.repulsion.acts_in(i, config.num_blocks)

    @property
    def pushed_block(self) -> int | None:
        """The first of these blocks, for whose push the kit holds all intermediate tensors; None: there is none."""
        return next(filter(self.pushes, range(self.transformer.num_dual_blocks)), None)
