"""A prompt becomes what the MMDiT reads: the context, a sequence of tokens, and the pooled vector."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit import ClipTextEncoder, ClipTokenizer, T5Encoder, T5Tokenizer

T5_LIMIT = {"flux": 512, "sd3": 256}


@dataclass
class TextEncoders:
    """The tokenizers and text encoders of a checkpoint, in the order of its folder.

    FLUX.1: CLIP-L and T5. SD3: CLIP-L, CLIP-G and T5, which may be missing (its tokens are then zeros).
    """

    family: str  # "flux" or "sd3"
    context_dim: int
    clips: list[tuple[ClipTokenizer, ClipTextEncoder]]
    t5: tuple[T5Tokenizer, T5Encoder] | None = None

    @property
    def t5_length(self) -> int:
        limit = T5_LIMIT[self.family]
        return limit if self.t5 is None else min(limit, self.t5[0].length)

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """One prompt → context (1, N, context_dim), pooled (1, pooled_dim).

        FLUX.1: T5's states; CLIP-L's pooled vector. SD3: the two CLIPs' penultimate states side by side, padded with
        zeros to T5's width, then T5's states; the two pooled vectors side by side.
        Raises ValueError for a prompt that is longer than every tokenizer's limit.
        """
        self.check_length(prompt)
        outputs = [encoder(tokenizer([prompt]).to(device_of(encoder))) for tokenizer, encoder in self.clips]
        pooled = torch.cat([output.pooled for output in outputs], dim=-1)
        if self.t5 is None:
            t5 = pooled.new_zeros(1, self.t5_length, self.context_dim)
        else:
            tokenizer, encoder = self.t5
            t5 = encoder(tokenizer([prompt], length=self.t5_length).to(device_of(encoder)))
        if self.family == "flux":
            return t5, pooled
        states = torch.cat([output.penultimate for output in outputs], dim=-1)
        states = F.pad(states, (0, self.context_dim - states.shape[-1]))
        return torch.cat([states, t5.to(states.dtype)], dim=1), pooled

    def check_length(self, prompt: str) -> None:
        lengths = [(tokenizer.count(prompt), tokenizer.length) for tokenizer, _ in self.clips]
        if self.t5 is not None:
            lengths.append((self.t5[0].count(prompt), self.t5_length))
        cut = [(count, limit) for count, limit in lengths if count > limit]
        if len(cut) == len(lengths):
            count, limit = max(cut, key=lambda pair: pair[1])
            raise ValueError(f"the prompt has {count} tokens and this checkpoint reads {limit}: shorten it")
        if cut:
            message = f"CLIP reads only {cut[0][1]} of the prompt's {cut[0][0]} tokens; T5 reads them all"
            warnings.warn(message, stacklevel=3)


def device_of(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device
