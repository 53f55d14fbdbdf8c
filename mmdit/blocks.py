"""The two kinds of transformer block: dual-stream (SD3, FLUX.1) and single-stream (FLUX.1)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from repulsion import Repulsion

from .attention import JointAttention, SelfAttention, attend
from .config import MMDiTConfig
from .layers import MLP, Modulation, modulate


class Stream(nn.Module):
    """What one stream owns in a dual-stream block besides its projections: the modulation and the MLP.

    `parts` of the modulation: 6 (shift, scale, gate of the attention, then of the MLP), 9 with a second attention,
    2 (shift, scale) where the stream ends in this block's attention and needs no MLP.
    """

    def __init__(self, config: MMDiTConfig, parts: int = 6):
        super().__init__()
        self.modulation = Modulation(config.hidden_size, parts)
        if parts > 2:
            self.mlp = MLP(config.hidden_size, config.mlp_width, config.hidden_size, nn.GELU("tanh"))

    def finish(self, tokens: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The MLP's residual step: (b, n, d) → (b, n, d)."""
        return tokens + gate * self.mlp(modulate(tokens, shift, scale))


class DualBlock(nn.Module):
    """Context and image keep weights of their own and meet in one attention.

    context (b, n, d), image (b, m, d), vector (b, d) → context, image. Block `index` of an SD3-type model's last
    returns None for the context.
    """

    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        last = config.context_ends_early and index == config.num_dual_blocks - 1
        second = index in config.dual_attention_blocks
        sizes = (config.hidden_size, config.num_heads, config.qk_norm)
        self.context = Stream(config, parts=2 if last else 6)
        self.image = Stream(config, parts=9 if second else 6)
        self.attention = JointAttention(*sizes, context_out=not last)
        self.image_attention = SelfAttention(*sizes) if second else None

    def forward(self, context: Tensor, image: Tensor, vector: Tensor, angles: Tensor | None = None,
                repulsion: Repulsion | None = None, groups: int = 1) -> tuple[Tensor | None, Tensor]:
        c_shift, c_scale, *c_rest = self.context.modulation(vector)
        shift, scale, gate, *rest = self.image.modulation(vector)
        context_attended, image_attended = self.attention(
            modulate(context, c_shift, c_scale), modulate(image, shift, scale), angles, repulsion, groups
        )
        image_after = image + gate * image_attended
        if self.image_attention is not None:
            shift, scale, gate = rest[3:]
            image_after = image_after + gate * self.image_attention(modulate(image, shift, scale))
        image = self.image.finish(image_after, *rest[:3])
        if context_attended is None:
            context = None
        else:
            c_gate, *c_mlp = c_rest
            context = self.context.finish(context + c_gate * context_attended, *c_mlp)
        if repulsion is not None:
            context, image = repulsion.streams("block", context, image, groups)
        return context, image


class SingleBlock(nn.Module):
    """Context and image as one sequence; attention and MLP side by side from one projection (FLUX.1).

    tokens (b, n + m, d), the first `num_context` of them the context; vector (b, d) → (b, n + m, d).
    """

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        self.widths = [3 * width, config.mlp_width]
        self.modulation = Modulation(width, 3)
        self.linear_in = nn.Linear(width, sum(self.widths))
        self.norm_q = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.activation = nn.GELU("tanh")
        self.linear_out = nn.Linear(width + config.mlp_width, width)

    def forward(self, tokens: Tensor, vector: Tensor, num_context: int, angles: Tensor | None = None,
                repulsion: Repulsion | None = None, groups: int = 1) -> Tensor:
        shift, scale, gate = self.modulation(vector)
        qkv, mlp = self.linear_in(modulate(tokens, shift, scale)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b n (three h k) -> three b h n k", three=3, h=self.heads)
        attended = attend(self.norm_q(q), self.norm_k(k), v, angles)
        if repulsion is not None:  # Eq. 2 again: here the paper pushes all tokens
            attended = repulsion.sequence("attention", attended, num_context, groups)
        tokens = tokens + gate * self.linear_out(torch.cat([attended, self.activation(mlp)], dim=-1))
        if repulsion is not None:
            tokens = repulsion.sequence("block", tokens, num_context, groups)
        return tokens
