"""`Repulsion`: how strongly, when and where in the model the samples of a batch push each other apart."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .repel import check_settings, repel

THIRDS = ("first", "middle", "last")


@dataclass(frozen=True)
class Repulsion:
    """The settings of contextual repulsion. `bind` makes of them the push of one block.

    strength: s, 0 or more: the push of a group is s times as long as the group's tokens; no unit. In M > 1 steps that
    is the length of the path, whose ends are nearer where the gradient turns on the way; or
    scale: η, 0 or more, instead: the step size of the paper; its unit differs from model to model
    iterations: M, the number of gradient steps that one push consists of
    steps: τ, repel in that many of the first denoising steps,
    start: after leaving out so many at the beginning (0: none, the paper)
    until: σ in [0, 1], instead of steps: repel in the steps whose noise level is at least this
    blocks: "all", a third of them ("first", "middle", "last"), or their indices (dual-stream blocks come first)
    branches: with classifier-free guidance push "all" branches, each a group of its own (the paper), or the
    "conditional" one alone, which is the last group
    single_stream_tokens: in single-stream blocks push "all" tokens (the paper), only the "context", or "none"
    objective: "vendi" (the paper), "dpp", "rke", "cosine" (see `repulsion.objectives`), or the control "spread",
    straight away from the group's mean
    kernel_reg: ε of the regularized kernel
    solver: "gram" (B × B matrices) or "autograd" (the paper's loop)

    Raises ValueError naming the field that is out of range.
    """

    strength: float | None = None
    scale: float | None = None
    iterations: int = 1
    steps: int = 1
    start: int = 0
    blocks: Literal["all", "first", "middle", "last"] | tuple[int, ...] = "all"
    branches: Literal["all", "conditional"] = "all"
    single_stream_tokens: Literal["all", "context", "none"] = "all"
    objective: Literal["vendi", "dpp", "rke", "cosine", "spread"] = "vendi"
    kernel_reg: float = 1e-4
    solver: Literal["gram", "autograd"] = "gram"
    until: float | None = None

    def __post_init__(self):
        named = isinstance(self.blocks, str)
        check_settings(self.strength, self.scale, self.iterations, self.objective, self.kernel_reg, self.solver,
                       blocks=(self.blocks if named else "all", ("all", *THIRDS)),
                       branches=(self.branches, ("all", "conditional")),
                       single_stream_tokens=(self.single_stream_tokens, ("all", "context", "none")))
        if not isinstance(self.blocks, (str, tuple, list)):
            raise ValueError(f"repulsion blocks must be a name or a tuple of indices, got {self.blocks!r}")
        blocks = () if named else tuple(self.blocks)
        object.__setattr__(self, "blocks", self.blocks if named else blocks)
        for field, values in (("steps", (self.steps,)), ("start", (self.start,)), ("blocks", blocks)):
            if any(not isinstance(value, int) or value < 0 for value in values):
                raise ValueError(f"repulsion {field} must be whole numbers from 0 on, got {getattr(self, field)}")
        if self.until is not None and not 0 <= self.until <= 1:
            raise ValueError(f"repulsion until must be a noise level from 0 to 1, got {self.until}")
        if self.until is not None and self.steps != 1:
            raise ValueError(f"repulsion has until, {self.until}, and steps, {self.steps}: give one")

    def acts_at(self, step: int, sigma: float) -> bool:
        """Whether denoising step number `step`, from 0, at noise level `sigma`, repels."""
        early = step < self.start + self.steps if self.until is None else sigma >= self.until
        return self.start <= step and early

    def acts_in(self, block: int, num_blocks: int) -> bool:
        """Whether block number `block` of `num_blocks` repels."""
        if isinstance(self.blocks, str):
            return self.blocks in ("all", THIRDS[3 * block // num_blocks])
        return block in self.blocks

    def check_blocks(self, num_blocks: int) -> None:
        """Raises ValueError where `blocks` names one that a model of `num_blocks` does not have."""
        last = 0 if isinstance(self.blocks, str) else max(self.blocks, default=0)
        if last >= num_blocks:
            raise ValueError(f"repulsion in block {last}, but this model's blocks end at {num_blocks - 1}")

    def bind(self, block: int, num_blocks: int, groups: int = 1,
             num_context: int | None = None) -> Callable[[Tensor], Tensor] | None:
        """The push of block number `block`: tokens (groups · B, n, d) → the same shape; None where it does not repel.

        A dual-stream block pushes its context tokens. A single-stream block, for which `num_context` is given, pushes
        the tokens of its sequence that `single_stream_tokens` names; the first `num_context` are the context.
        """
        first = None if num_context is None or self.single_stream_tokens == "all" else num_context
        if not self.acts_in(block, num_blocks) or (num_context is not None and self.single_stream_tokens == "none"):
            return None
        function = torch.compiler.disable(repel) if torch.compiler.is_compiling() else repel
        return partial(function, scale=self.scale, iterations=self.iterations, strength=self.strength,
                       objective=self.objective, kernel_reg=self.kernel_reg, solver=self.solver, groups=groups,
                       last_group=self.branches == "conditional", first=first)
