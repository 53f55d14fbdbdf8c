"""The two kinds of transformer block: dual-stream (SD3, FLUX) and single-stream (FLUX)."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import JointAttention, Push, SelfAttention, attend
from .config import MMDiTConfig
from .layers import MLP, Modulation, SharedModulation, SwiGLU, Triple, clip_float16, modulate


class StreamModulation(NamedTuple):
    """The modulation of one stream in a dual-stream block."""

    attention: Triple
    mlp: Triple | None = None  # None where the stream ends in this block's attention
    second: Triple | None = None  # of the second, image-only attention (SD3.5-medium)


def modulation_of(config: MMDiTConfig, stream: str, parts: int) -> nn.Module:
    """A block's own modulation, or the part that a stream takes of the shared one."""
    return SharedModulation(stream) if config.shared_modulation else Modulation(config.hidden_size, parts, config.bias)


def activation_of(config: MMDiTConfig) -> nn.Module:
    return SwiGLU() if config.gated_mlp else nn.GELU("tanh")


class Stream(nn.Module):
    """Modulation and MLP of one stream in a dual-stream block; 3, 6 or 9 parts, or 2 (shift, scale) and no MLP."""

    def __init__(self, config: MMDiTConfig, name: str, parts: int = 6):
        super().__init__()
        self.modulation = modulation_of(config, name, parts)
        if parts > 2:
            self.mlp = MLP(config.hidden_size, config.mlp_width, config.hidden_size, activation_of(config), config.bias)


class DualBlock(nn.Module):
    """Context and image have weights of their own and meet in one attention.

    context (b, n, d), image (b, m, d), vector (b, d) → context, image. The last block of an SD3-type model, whose
    context output is unused, returns None for it. With a shared modulation, `vector` is what that computed.
    """

    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        last = config.context_ends_early and index == config.num_dual_blocks - 1
        second = index in config.dual_attention_blocks
        sizes = (config.hidden_size, config.num_heads, config.qk_norm, config.bias)
        self.context = Stream(config, "context", parts=2 if last else 6)
        self.image = Stream(config, "image", parts=9 if second else 6)
        self.attention = JointAttention(*sizes, context_out=not last)
        self.image_attention = SelfAttention(*sizes) if second else None

    def forward(self, context: Tensor, image: Tensor, vector: Tensor, rope: Tensor | None = None,
                push: Push | None = None) -> tuple[Tensor | None, Tensor]:
        of_context = StreamModulation(*self.context.modulation(vector))
        of_image = StreamModulation(*self.image.modulation(vector))

        image_in = modulate(image, of_image.attention)
        context_attended, image_attended = self.attention(modulate(context, of_context.attention), image_in, rope, push)

        after = image + of_image.attention.gate * image_attended
        if self.image_attention is not None:  # of the image as it entered the block
            after = after + of_image.second.gate * self.image_attention(modulate(image, of_image.second))
        image = clip_float16(after + of_image.mlp.gate * self.image.mlp(modulate(after, of_image.mlp)))

        if context_attended is None:
            return None, image
        context = context + of_context.attention.gate * context_attended
        context = context + of_context.mlp.gate * self.context.mlp(modulate(context, of_context.mlp))
        return clip_float16(context), image


class SingleBlock(nn.Module):
    """Context and image as one sequence; attention and MLP in parallel from one projection (FLUX).

    tokens (b, n + m, d), the context first; vector (b, d), or as in `DualBlock` → (b, n + m, d).
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.widths = [3 * width, (1 + config.gated_mlp) * config.mlp_width]  # gated: gate and value
        self.modulation = modulation_of(config, "single", 3)
        self.linear_in = nn.Linear(width, sum(self.widths), config.bias)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.activation = activation_of(config)
        self.linear_out = nn.Linear(width + config.mlp_width, width, config.bias)

    def forward(self, tokens: Tensor, vector: Tensor, rope: Tensor | None = None, push: Push | None = None) -> Tensor:
        (modulation,) = self.modulation(vector)
        qkv, mlp = self.linear_in(modulate(tokens, modulation)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b n (three h k) -> three b h n k", three=3, h=self.heads)
        attended = attend(self.norm_q(q), self.norm_k(k), v, rope)
        if push:
            attended = push(attended)  # Eq. 2 again; here the paper pushes all tokens
        out = self.linear_out(torch.cat([attended, self.activation(mlp)], dim=-1))
        return clip_float16(tokens + modulation.gate * out)
