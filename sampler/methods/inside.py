"""`Inside`: a method that changes image tokens inside the transformer, by forward hooks for the time of a step."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..guidance import GuidedVelocity
from ..schedule import Velocity
from .method import Method


class Place(NamedTuple):
    """The call in which image tokens leave a block."""

    rows: int  # of image tokens
    columns: int
    samples: int  # of each branch of guidance; the branches follow one another in the batch
    seed: int
    step: int
    block: int


class Inside(Method):
    """A method that changes the image tokens which leave some blocks, dual-stream or single-stream, in some steps.

    The tokens of reference pictures and of the text stay as they are; all branches of guidance are changed alike.
    """

    def blocks(self, count: int) -> Sequence[int]:
        """The blocks that are changed, of `count`, the dual-stream ones first."""
        raise NotImplementedError

    def acts_at(self, sigma: float, step: int, steps: int) -> bool:
        """Whether step number `step` of `steps`, at σ, is changed."""
        raise NotImplementedError

    def change(self, image: Tensor, again: Callable[[Tensor], Tensor], place: Place) -> Tensor:
        """What goes on instead of the image tokens (g · b, m, d); `again` runs the block on such tokens once more."""
        raise NotImplementedError

    def velocity(self, velocity: GuidedVelocity, sigmas: Tensor) -> Velocity:
        def hooked(x: Tensor, sigma: float, step: int, guided: bool = True) -> Tensor:
            if self.strength == 0 or not self.acts_at(sigma, step, len(sigmas) - 1):
                return velocity(x, sigma, step, guided)
            model = velocity.transformer.module
            p, blocks = model.config.patch_size, [*model.dual_blocks.children(), *model.single_blocks.children()]
            tokens = sum(latent.shape[2] * latent.shape[3] for latent in (x, *velocity.references)) // p**2
            with ExitStack() as hooks:
                for i in self.blocks(len(blocks)):
                    if i >= len(blocks):
                        raise ValueError(f"{type(self).__name__} acts in block {i}, but this model's blocks end at "
                                         f"{len(blocks) - 1}")
                    place = Place(x.shape[2] // p, x.shape[3] // p, len(x), velocity.seed, step, i)
                    hook = partial(self.leave, tokens=tokens, place=place)
                    hooks.enter_context(blocks[i].register_forward_hook(hook))
                return velocity(x, sigma, step, guided)

        return hooked

    def leave(self, block: nn.Module, args: tuple, output: Tensor | tuple, *, tokens: int, place: Place):
        """The forward hook of a block: its output with other image tokens; `tokens`: the image's and references'."""
        dual, m = isinstance(output, tuple), place.rows * place.columns

        def split(streams: Tensor | tuple) -> tuple[Tensor | None, Tensor, Tensor]:
            """Text, image and references."""
            text, rest = streams if dual else (streams[:, :-tokens], streams[:, -tokens:])
            return text, rest[:, :m], rest[:, m:]

        def join(text: Tensor | None, image: Tensor, references: Tensor) -> tuple:
            pictures = torch.cat([image, references], dim=1)
            return (text, pictures) if dual else (torch.cat([text, pictures], dim=1),)

        def again(image: Tensor) -> Tensor:
            text, vector, rope = split(args[:2] if dual else args[0])[0], *args[-3:-1]
            return split(block.forward(*join(text, image, references), vector, rope, None))[1]

        text, image, references = split(output)
        changed = join(text, self.change(image, again, place), references)
        return changed if dual else changed[0]


def in_first(share: float, step: int, steps: int) -> bool:
    """Whether a step is among the first so many, a share of all, and at least one."""
    return step < max(1, round(share * steps))
