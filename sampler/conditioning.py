"""A prompt becomes what the MMDiT reads: the context, a sequence of tokens, and the pooled vector."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdit import ClipTokenizer, MistralTokenizer, QwenTokenizer, T5Tokenizer
from mmdit.clip import ClipOutput
from weights import Checkpoint, read_tekken

from .parts import Part, finite

T5_LIMIT = {"flux": 512, "sd3": 256}  # tokens; FLUX.1-schnell's 256 is given by `t5_limit`


@dataclass
class TextEncoders:
    """The tokenizers and text encoders of FLUX.1 or SD3, in the order of the checkpoint's folder.

    FLUX.1: CLIP-L and T5. SD3: CLIP-L, CLIP-G and T5, which may be missing (its tokens are then zeros).
    """

    family: str  # "flux" or "sd3"
    context_dim: int
    clips: list[tuple[ClipTokenizer, Part]]
    t5: tuple[T5Tokenizer, Part] | None = None
    t5_limit: int | None = None  # tokens of T5 that the transformer was trained with; None: those of its family

    @property
    def encoders(self) -> dict[str, tuple[ClipTokenizer | T5Tokenizer, Part]]:
        """Tokenizer and network by role."""
        return dict(zip(("clip_l", "clip_g"), self.clips, strict=False)) | ({"t5": self.t5} if self.t5 else {})

    @property
    def t5_length(self) -> int:
        limit = self.t5_limit or T5_LIMIT[self.family]
        return limit if self.t5 is None else min(limit, self.t5[0].length)

    @torch.no_grad()
    def __call__(self, *prompts: str) -> tuple[Tensor, Tensor]:
        """Each prompt by itself → context (prompts, N, context_dim), pooled (prompts, pooled_dim).

        FLUX.1: T5's states; CLIP-L's pooled vector, never projected. SD3: the two CLIPs' penultimate states side by
        side, padded with zeros to T5's width, then T5's states; the two pooled vectors side by side.
        Raises ValueError for a prompt that is longer than every tokenizer's limit, and naming an encoder that returns
        NaN.
        """
        for prompt in prompts:
            self.check_length(prompt)
        clips = [join_batch(encode(part, [tokenizer([p]) for p in prompts])) for tokenizer, part in self.clips]
        if self.t5 is None:
            t5 = clips[0].penultimate.new_zeros(len(prompts), self.t5_length, self.context_dim)
        else:
            tokenizer, part = self.t5
            t5 = torch.cat(encode(part, [tokenizer([p], length=self.t5_length) for p in prompts]))
        finite(t5, "the text encoder T5")
        for name, clip in zip(("CLIP-L", "CLIP-G"), clips, strict=False):
            for states in [clip.unprojected] if self.family == "flux" else [clip.penultimate, clip.pooled]:
                finite(states, f"the text encoder {name}")
        return (t5, clips[0].unprojected) if self.family == "flux" else sd3_conditioning(clips, t5)

    def check_length(self, prompt: str) -> None:
        """Warns of a text encoder that truncates the prompt. Raises ValueError where each of them does."""
        lengths = [(tokenizer.length, tokenizer.count(prompt), name)
                   for name, (tokenizer, _) in zip(("CLIP-L", "CLIP-G"), self.clips, strict=False)]
        if self.t5 is not None:
            lengths.append((self.t5_length, self.t5[0].count(prompt), "T5"))
        cut = [(limit, count, name) for limit, count, name in lengths if count > limit]
        if len(cut) == len(lengths):
            raise ValueError(f"the prompt has {max(cut)[1]} tokens and this checkpoint reads {max(cut)[0]}: shorten it")
        for limit, count, name in cut[:1]:
            whole = [length[2] for length in lengths if length not in cut][-1]
            message = f"{name} reads only {limit} of the prompt's {count} tokens; {whole} reads them all"
            warnings.warn(message, stacklevel=3)


@dataclass
class ChatEncoder:
    """FLUX.2's tokenizer and text encoder: a language model, to which the prompt is a message in a chat."""

    tokenizer: QwenTokenizer | MistralTokenizer
    decoder: Part
    family = "flux2"

    @property
    def encoders(self) -> dict[str, tuple[QwenTokenizer | MistralTokenizer, Part]]:
        """Tokenizer and network by role."""
        return {"text": (self.tokenizer, self.decoder)}

    @torch.no_grad()
    def __call__(self, *prompts: str) -> tuple[Tensor, None]:
        """Each prompt by itself → context (prompts, N, context_dim), with the states of padding; no pooled vector.

        Raises ValueError where the encoder returns NaN.
        """
        for prompt in prompts:
            self.check_length(prompt)
        with self.decoder.used() as decoder:
            device = next(decoder.parameters()).device
            context = [decoder(self.tokenizer([p]).to(device), self.tokenizer.mask([p])) for p in prompts]
        return finite(torch.cat(context), "the text encoder"), None

    def check_length(self, prompt: str) -> None:
        """Warns where the prompt, or the template's end behind it, is truncated, as FLUX.2's programs do."""
        if (count := self.tokenizer.count(prompt)) > self.tokenizer.length:
            warnings.warn(f"the text encoder reads only {self.tokenizer.length} of the prompt's {count} tokens",
                          stacklevel=3)


class EncodedBefore:
    """The outputs of text encoders for `prompts`, in their place; each encoder is read once. They are in the CPU's
    memory: in bfloat16, 4 MiB a prompt with FLUX.1, 8 with FLUX.2-klein-4B, 15 with -dev.
    """

    def __init__(self, text: TextEncoders | ChatEncoder, prompts: Sequence[str]):
        self.family, self.check_length, self.encoded = text.family, text.check_length, {}
        with ExitStack() as stack:
            for _, part in text.encoders.values():
                stack.enter_context(part.used(now=False))
            for prompt in prompts:
                states = text(prompt)
                self.encoded[prompt], self.device = [None if x is None else x.cpu() for x in states], states[0].device

    def __call__(self, *prompts: str) -> tuple[Tensor, Tensor | None]:
        """As the text encoders. Raises KeyError for another prompt."""
        columns = zip(*(self.encoded[prompt] for prompt in prompts), strict=True)
        return tuple(None if column[0] is None else torch.cat(column).to(self.device) for column in columns)


def find_text_encoders(found: Checkpoint, parts: dict[str, Part], context_dim: int,
                       t5_limit: int | None) -> TextEncoders | ChatEncoder:
    """The text encoders among the parts of a pipeline, by role, each with the tokenizer that was found for it."""
    files = found.tokenizers
    if found.family == "flux2":
        kind = QwenTokenizer if found.parts["text"].shape("layers.0.attention.norm_q.weight") else MistralTokenizer
        file = files["text"]  # a folder, or the weights' file that holds Mistral's
        return ChatEncoder(kind(file if file.is_dir() else read_tekken(file)), parts["text"])
    clips = [(ClipTokenizer(files[role]), parts[role]) for role in ("clip_l", "clip_g") if role in parts]
    t5 = (T5Tokenizer(files["t5"]), parts["t5"]) if "t5" in parts else None
    return TextEncoders(found.family, context_dim, clips, t5, t5_limit)


def sd3_conditioning(clips: list[ClipOutput], t5: Tensor) -> tuple[Tensor, Tensor]:
    """SD3's context (b, n + m, d) and pooled vector (b, p), from what the two CLIPs return and T5's states (b, m, d).

    Context: the CLIPs' penultimate states, concatenated along the width and padded with zeros to d, then T5's states.
    Pooled: both pooled vectors, concatenated. Differentiable, for training.
    """
    states = torch.cat([clip.penultimate for clip in clips], dim=-1)
    states = F.pad(states, (0, t5.shape[-1] - states.shape[-1]))
    return torch.cat([states, t5.to(states.dtype)], dim=1), torch.cat([clip.pooled for clip in clips], dim=-1)


def join_batch(outputs: list[ClipOutput]) -> ClipOutput:
    """The outputs for several prompts as one batch."""
    return ClipOutput(*map(torch.cat, zip(*outputs, strict=True)))


def encode(network: Part, sequences: list[Tensor]) -> list:
    """What a text encoder makes of each sequence of token ids, one by one."""
    with network.used() as encoder:
        device = next(encoder.parameters()).device
        return [encoder(ids.to(device)) for ids in sequences]
