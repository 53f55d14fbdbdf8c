"""`tiny-sd3` as the teacher in distillation: its conditioning and its velocities with guidance."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit import ClipTextEncoder, ClipTokenizer, T5Encoder, T5Tokenizer
from sampler.conditioning import sd3_conditioning
from weights import load_autoencoder, load_text_encoder, load_transformer

FASTEST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # for inference
TOKENIZERS = "tokenizer", "tokenizer_2", "tokenizer_3"  # the folders of SD3's three vocabularies


def sd3_condition(clips: Sequence[ClipTextEncoder], t5: T5Encoder, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Context (b, 2 n, d) and pooled vector (b, p) of captions, from SD3's three text encoders and their token ids."""
    return sd3_conditioning([clip(tokens) for clip, tokens in zip(clips, ids, strict=False)], t5(ids[2]))


def trusting(encoder: ClipTextEncoder | T5Encoder) -> ClipTextEncoder | T5Encoder:
    """The same text encoder, which no longer checks its token ids: that waits for a GPU, and these come from its own
    tokenizer."""
    encoder._check = lambda ids: None
    return encoder


class Teacher(nn.Module):
    """The networks of a checkpoint in SD3's layout, in float32, frozen."""

    def __init__(self, folder: Path, device: str):
        super().__init__()
        where = {"dtype": torch.float32, "device": device}
        self.device = device
        clip_l, clip_g, t5 = TOKENIZERS
        self.tokenizers = [ClipTokenizer(folder / clip_l), ClipTokenizer(folder / clip_g), T5Tokenizer(folder / t5)]
        *clips, self.t5 = (trusting(load_text_encoder(folder / f"text_encoder{n}", **where)) for n in ("", "_2", "_3"))
        self.clips = nn.ModuleList(clips)
        self.transformer = load_transformer(folder, **where)
        self.autoencoder = load_autoencoder(folder / "vae", **where)
        self.requires_grad_(False).eval()
        self.empty = self.condition(*[ids.to(device) for ids in self.tokenize([""])])

    def tokenize(self, captions: list[str]) -> list[Tensor]:
        """Token ids (b, n) of captions in each of the three vocabularies, on the CPU."""
        return [tokenize(captions) for tokenize in self.tokenizers]

    def condition(self, *ids: Tensor) -> tuple[Tensor, Tensor]:
        """Context (b, n, d) and pooled vector (b, p) of captions."""
        return sd3_condition(self.clips, self.t5, ids)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, sigma: Tensor, condition: tuple[Tensor, Tensor], guidance: Tensor) -> Tensor:
        """The velocity with classifier-free guidance, u + w (c − u), where `guidance` is w (b,).

        noisy (b, c, H, W); sigma (b,); condition: `condition` of b captions → (b, c, H, W).
        """
        both = [torch.cat([empty.expand_as(captioned), captioned])
                for empty, captioned in zip(self.empty, condition, strict=True)]
        with sdpa_kernel(FASTEST):
            twice = self.transformer(noisy.repeat(2, 1, 1, 1), sigma.repeat(2), *both)
        unconditional, conditional = twice.float().chunk(2)
        return torch.lerp(unconditional, conditional, rearrange(guidance, "b -> b 1 1 1"))


class FluxTextEncoders(nn.Module):
    """FLUX.1's conditioning: the states of a T5 of its own, and the vector of the teacher's CLIP-L, which is frozen,
    before the projection."""

    def __init__(self, teacher: Teacher, t5: T5Encoder):
        super().__init__()
        clip, self.t5 = teacher.clips[0], t5
        self.clip = trusting(ClipTextEncoder(replace(clip.config, projection_dim=None)).to(teacher.device))
        self.clip.load_state_dict({k: v for k, v in clip.state_dict().items() if not k.startswith("projection")})
        self.clip.requires_grad_(False)

    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Context (b, n, d) and pooled vector (b, p)."""
        return self.t5(t5_ids), self.clip(clip_ids).unprojected
