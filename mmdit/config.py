"""The sizes of a multimodal diffusion transformer, and the public checkpoints' by name."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class MMDiTConfig:
    """The sizes and options of an MMDiT.

    `position` is the family: "rope" rotates queries and keys (FLUX), "table" adds a learned-size sin/cos table to
    the image tokens (Stable Diffusion 3). `rope_axes` are the head's dimensions given to (index, row, column) and sum
    to the head width; on a fourth axis the text has positions of its own (FLUX.2). `dual_attention_blocks` are the
    blocks with a second, image-only attention (SD3.5-medium). `pooled_dim` None: no pooled text vector (FLUX.2), which
    also has no biases, gated MLPs (SwiGLU), one modulation for all blocks of a kind, and reference pictures
    `reference_step` apart on the first axis.

    Raises ValueError where the sizes do not fit together.
    """

    hidden_size: int
    num_heads: int
    num_dual_blocks: int
    num_single_blocks: int = 0
    latent_channels: int = 16
    patch_size: int = 2
    context_dim: int = 4096
    pooled_dim: int | None = 768
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    position: Literal["rope", "table"] = "rope"
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_theta: int = 10_000
    position_table_size: int = 192
    guidance_embedding: bool = False
    dual_attention_blocks: tuple[int, ...] = ()
    bias: bool = True
    gated_mlp: bool = False
    shared_modulation: bool = False
    reference_step: int = 1

    def __post_init__(self):
        object.__setattr__(self, "rope_axes", tuple(self.rope_axes))
        object.__setattr__(self, "dual_attention_blocks", tuple(self.dual_attention_blocks))
        for name in ("hidden_size", "num_heads", "num_dual_blocks", "latent_channels", "patch_size", "context_dim",
                     "pooled_dim", "mlp_width", "position_table_size", "reference_step"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"MMDiTConfig: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_single_blocks < 0:
            raise ValueError(f"MMDiTConfig: num_single_blocks must not be negative, got {self.num_single_blocks}")
        if self.position == "table" and self.hidden_size % 4:
            raise ValueError(f"MMDiTConfig: a position table needs a hidden_size that is a multiple of 4, got "
                             f"{self.hidden_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"MMDiTConfig: hidden_size {self.hidden_size} is no multiple of {self.num_heads} heads")
        if self.position not in ("rope", "table"):
            raise ValueError(f'MMDiTConfig: position must be "rope" or "table", got {self.position!r}')
        axes = self.rope_axes
        if self.position == "rope" and (
            sum(axes) != self.head_dim or len(axes) not in (3, 4) or any(axis % 2 or axis < 2 for axis in axes)
        ):
            raise ValueError(
                f"MMDiTConfig: rope_axes must be three or four even numbers that sum to the head width "
                f"{self.head_dim}, got {self.rope_axes}"
            )
        if self.shared_modulation and (self.context_ends_early or self.dual_attention_blocks):
            raise ValueError("MMDiTConfig: shared_modulation needs single-stream blocks, and no dual_attention_blocks")
        if any(not 0 <= i < self.num_dual_blocks for i in self.dual_attention_blocks):
            raise ValueError(
                f"MMDiTConfig: dual_attention_blocks {self.dual_attention_blocks} must lie in 0 … "
                f"{self.num_dual_blocks - 1}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, k."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width inside the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch of the latent: c · p · p."""
        return self.latent_channels * self.patch_size**2

    @property
    def num_blocks(self) -> int:
        """Dual-stream blocks come first, single-stream blocks after them; repulsion counts them in this order."""
        return self.num_dual_blocks + self.num_single_blocks

    @property
    def context_ends_early(self) -> bool:
        """Whether the last dual-stream block drops its context: it does where no block after it reads it (SD3)."""
        return self.num_single_blocks == 0


_FLUX = MMDiTConfig(hidden_size=3072, num_heads=24, num_dual_blocks=19, num_single_blocks=38)
_FLUX2 = MMDiTConfig(hidden_size=3072, num_heads=24, num_dual_blocks=5, num_single_blocks=20, latent_channels=128,
                     patch_size=1, context_dim=7680, pooled_dim=None, mlp_ratio=3.0, rope_axes=(32, 32, 32, 32),
                     rope_theta=2000, bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
_KLEIN_9B = replace(_FLUX2, hidden_size=4096, num_heads=32, num_dual_blocks=8, num_single_blocks=24, context_dim=12288)
_SD3 = MMDiTConfig(hidden_size=1536, num_heads=24, num_dual_blocks=24, pooled_dim=2048, position="table")
_LARGE = replace(_SD3, hidden_size=2432, num_heads=38, num_dual_blocks=38)

PRESETS: dict[str, MMDiTConfig] = {
    "flux1-dev": replace(_FLUX, guidance_embedding=True),
    "flux1-schnell": _FLUX,
    "flux1-dev-de-distill": _FLUX,
    "flux1-kontext-dev": replace(_FLUX, guidance_embedding=True),
    "flux2-dev": replace(_KLEIN_9B, hidden_size=6144, num_heads=48, num_single_blocks=48, context_dim=15360,
                         guidance_embedding=True),
    "flux2-klein-base-9b": _KLEIN_9B,
    "flux2-klein-9b": _KLEIN_9B,
    "flux2-klein-9b-kv": _KLEIN_9B,
    "flux2-klein-base-4b": _FLUX2,
    "flux2-klein-4b": _FLUX2,
    "sd3-medium": replace(_SD3, qk_norm=False),
    "sd3.5-medium": replace(_SD3, position_table_size=384, dual_attention_blocks=tuple(range(13))),
    "sd3.5-large": _LARGE,
    "sd3.5-large-turbo": _LARGE,
}
