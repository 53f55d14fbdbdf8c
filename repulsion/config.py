"""`Repulsion`: how strongly, when and where in the model the samples of a batch push each other apart."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .repel import check_settings, repel

Blocks = Literal["all", "first", "middle", "last"] | tuple[int, ...]


@dataclass(frozen=True)
class Repulsion:
    """The settings of contextual repulsion, and the two places in the model where it acts.

    scale: η, the length of the push (0 or more; its unit differs from model to model, see `PRESETS`), or
    diversity: instead of a scale, how much more diverse each push makes the tokens: the share, 0 to 1, of what their
    entropy lacks to log B; it has no unit
    iterations: M, small steps that the push is made of
    steps: τ, repel in that many of the first denoising steps,
    start: after leaving out so many at the very beginning (0: none, the paper)
    blocks: "all", a third of them ("first", "middle", "last"), or their indices (dual-stream blocks come first)
    tokens: "context" (the paper), or its ablations: "image", or "scores", the logits of the context's queries in the
    attention of dual-stream blocks
    branches: with classifier-free guidance push "all" branches, each a group of its own (the paper), or the
    "conditional" one alone, the last group
    single_stream_tokens: in single-stream blocks push "all" tokens (the paper), only the "context", or "none"
    site: "attention": what the joint attention returns, before gate and residual; "block": what leaves the block
    objective: "vendi" (the paper), "dpp", "rke" or "cosine", see `repulsion.objectives`
    kernel_reg: ε of the regularized kernel
    solver: "gram" (exact and fast) or "autograd" (the paper's loop)

    Raises ValueError naming the field that is out of range.
    """

    scale: float | None = None
    iterations: int = 50
    steps: int = 1
    blocks: Blocks = "all"
    tokens: Literal["context", "image", "scores"] = "context"
    branches: Literal["all", "conditional"] = "all"
    single_stream_tokens: Literal["all", "context", "none"] = "all"
    site: Literal["attention", "block"] = "attention"
    objective: str = "vendi"
    kernel_reg: float = 1e-4
    solver: Literal["gram", "autograd"] = "gram"
    diversity: float | None = None
    start: int = 0

    def __post_init__(self):
        check_settings(self.scale, self.diversity, self.iterations, self.objective, self.kernel_reg, self.solver)
        for field in ("steps", "start"):
            if getattr(self, field) < 0:
                raise ValueError(f"repulsion {field} must not be negative, got {getattr(self, field)}")
        for field, allowed in (("tokens", ("context", "image", "scores")), ("branches", ("all", "conditional")),
                               ("single_stream_tokens", ("all", "context", "none")), ("site", ("attention", "block"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"repulsion {field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if isinstance(self.blocks, str):
            if self.blocks not in ("all", "first", "middle", "last"):
                raise ValueError(f"repulsion blocks must be all, first, middle, last or indices, got {self.blocks!r}")
        else:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if any(not isinstance(i, int) or i < 0 for i in self.blocks):
                raise ValueError(f"repulsion blocks must be indices from 0 on, got {self.blocks}")

    @classmethod
    def preset(cls, name: str) -> "Repulsion":
        """The paper's settings for a public checkpoint, by its public name (see `PRESETS`)."""
        if name not in PRESETS:
            raise ValueError(f"no repulsion preset for {name!r}: there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def acts_at(self, step: int) -> bool:
        """Whether denoising step number `step`, from 0, repels."""
        return self.start <= step < self.start + self.steps

    def acts_in(self, block: int, num_blocks: int) -> bool:
        """Whether block number `block` of `num_blocks` repels."""
        if self.blocks == "all":
            return True
        if isinstance(self.blocks, str):
            return ("first", "middle", "last")[3 * block // num_blocks] == self.blocks
        return block in self.blocks

    def check_blocks(self, num_blocks: int) -> None:
        """Raises ValueError where `blocks` names one that a model of `num_blocks` does not have."""
        last = 0 if isinstance(self.blocks, str) else max(self.blocks, default=0)
        if last >= num_blocks:
            raise ValueError(f"repulsion in block {last}, but this model's blocks end at {num_blocks - 1}")

    def streams(self, site: str, context: Tensor | None, image: Tensor, groups: int) -> tuple[Tensor | None, Tensor]:
        """The two streams of a dual-stream block, one of them repelled if `site` is where this repulsion acts.

        context (groups · B, N, D), or None where the model has dropped it; image (groups · B, M, D) → the same shapes.
        """
        if site == self.site and self.tokens == "image":
            image = self._repel(image, groups)
        elif site == self.site and self.tokens == "context" and context is not None:
            context = self._repel(context, groups)
        return context, image

    def sequence(self, site: str, tokens: Tensor, num_context: int, groups: int) -> Tensor:
        """The sequence of a single-stream block, context first: tokens (groups · B, N + M, D) → the same shape."""
        if self.tokens == "image":
            start, stop = num_context, None
        else:
            start, stop = 0, {"all": None, "context": num_context, "none": 0}[self.single_stream_tokens]
        if site != self.site or stop == 0 or self.tokens == "scores":
            return tokens
        repelled = tokens.clone()
        repelled[:, start:stop] = self._repel(tokens[:, start:stop], groups)
        return repelled

    def scores(self, logits: Tensor, groups: int) -> Tensor:
        """The logits of the context's queries, repelled: (groups · B, heads, N, N + M) → the same shape."""
        return self._repel(logits.flatten(1, 2), groups).view_as(logits)

    def _repel(self, tokens: Tensor, groups: int) -> Tensor:
        still = len(tokens) - len(tokens) // groups if self.branches == "conditional" else 0  # so many stay as they are
        pushed = repel(tokens[still:], self.scale, self.iterations, diversity=self.diversity, objective=self.objective,
                       kernel_reg=self.kernel_reg, solver=self.solver, groups=1 if still else groups)
        return torch.cat([tokens[:still], pushed]) if still else pushed


PRESETS: dict[str, Repulsion] = {  # the settings table of the paper, η where it reports its figures
    "flux1-dev": Repulsion(scale=5e8, iterations=50, steps=1),
    "sd3.5-large": Repulsion(scale=5e5, iterations=100, steps=4),
    "sd3.5-large-turbo": Repulsion(scale=5e5, iterations=100, steps=1),
}
PRESETS["flux1-kontext-dev"] = PRESETS["flux1-dev"]  # "unchanged"
