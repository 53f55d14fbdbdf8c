"""Other places to push than the paper's, as forward hooks: the block's output, image tokens, attention scores.

The paper compares repulsion of the contextual tokens with these. The model itself has one place only; each ablation
here takes the push of a block away from its attention and applies it elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

from mmdit import MMDiT
from mmdit.attention import JointAttention, attend
from mmdit.position import rotate

PLACES = {  # name → what is pushed
    "block": "the context (in single-stream blocks the tokens) that leaves a block",
    "image": "the image tokens that the attention returns",
    "image, block": "the image tokens that leave a block",
    "scores": "the attention logits of the context's queries, in dual-stream blocks (the paper's appendix D)",
}


class ScoresAttention(JointAttention):
    """Joint attention in which `push` moves the logits of the context's queries apart, not the context."""

    def forward(self, context: Tensor, image: Tensor, rope: Tensor | None = None, push=None):
        if not push:
            return super().forward(context, image, rope)
        n = context.shape[1]
        streams = zip(self.context.to_qkv(context), self.image.to_qkv(image), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in streams)
        joint = attend(q, k, v, rope)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        logits = q[:, :, :n] @ k.mT * q.shape[-1] ** -0.5
        logits = push(logits.flatten(1, 2)).view_as(logits)
        joint = torch.cat([rearrange(logits.softmax(dim=-1) @ v, "b h n k -> b n (h k)"), joint[:, n:]], dim=1)
        return self.context.out(joint[:, :n]) if self.context.out else None, self.image.out(joint[:, n:])


@contextmanager
def pushing(model: MMDiT, place: str | None) -> Iterator[None]:
    """While the `with` block runs, each push of the model acts at `place` of PLACES; None: where the paper has it."""
    with ExitStack() as stack:
        if place == "scores":
            for block in model.dual_blocks:
                block.attention.__class__ = ScoresAttention
                stack.callback(setattr, block.attention, "__class__", JointAttention)
            for block in model.single_blocks:
                stack.enter_context(block.register_forward_pre_hook(lambda _, args: (*args[:-1], None)))
        elif place is not None:
            for block in (*model.dual_blocks, *model.single_blocks):
                for handle in Moved(model, block, place).handles:
                    stack.enter_context(handle)
        yield


class Moved:
    """The push of one block, taken from its attention and applied to another tensor of the block."""

    def __init__(self, model: MMDiT, block: nn.Module, place: str):
        dual, image = block in model.dual_blocks, "image" in place
        self.push: Callable[[Tensor], Tensor] | None = None
        self.width, self.num_context = model.config.hidden_size, 0
        self.handles = [model.register_forward_pre_hook(self.note_context, with_kwargs=True),
                        block.register_forward_pre_hook(self.take)]
        if dual:
            end = block if "block" in place else block.attention
            self.handles.append(end.register_forward_hook(self.image_of_two if image else self.context_of_two))
        elif "block" in place:
            self.handles.append(block.register_forward_hook(self.image_of_one if image else self.all_of_one))
        else:
            self.handles.append(block.linear_out.register_forward_pre_hook(self.image_of_joined))

    def note_context(self, model: MMDiT, args: tuple, kwargs: dict) -> None:
        self.num_context = (kwargs["context"] if "context" in kwargs else args[2]).shape[1]

    def take(self, block: nn.Module, args: tuple) -> tuple:
        *others, self.push = args
        return *others, None

    def context_of_two(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        context, image = output
        return (self.push(context) if self.push and context is not None else context), image

    def image_of_two(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        context, image = output
        return context, self.push(image) if self.push else image

    def all_of_one(self, block: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        return self.push(tokens) if self.push else tokens

    def image_of_one(self, block: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        n = self.num_context
        return torch.cat([tokens[:, :n], self.push(tokens[:, n:])], dim=1) if self.push else tokens

    def image_of_joined(self, linear: nn.Module, args: tuple) -> tuple | None:
        if not self.push:
            return None
        (joined,) = args  # attention and activation side by side
        joined = joined.clone()
        joined[:, self.num_context :, : self.width] = self.push(joined[:, self.num_context :, : self.width])
        return (joined,)
