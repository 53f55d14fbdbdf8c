"""MMDiT: a noisy latent, its noise level and a prompt go in, the velocity comes out."""

import torch
from einops import rearrange
from torch import Tensor, nn

from repulsion import Repulsion

from .blocks import DualBlock, SingleBlock
from .config import MMDiTConfig
from .layers import MLP, Modulation, modulate, timestep_features
from .position import crop_table, grid_positions, rope_angles, sincos_table


class MMDiT(nn.Module):
    """The multimodal diffusion transformer of Stable Diffusion 3 and FLUX.1; `MMDiTConfig` selects which."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.image_in = nn.Linear(config.patch_dim, width)
        self.context_in = nn.Linear(config.context_dim, width)
        self.time_in = MLP(256, width, width, nn.SiLU())
        self.pooled_in = MLP(config.pooled_dim, width, width, nn.SiLU())
        self.guidance_in = MLP(256, width, width, nn.SiLU()) if config.guidance_embedding else None
        if config.position == "table":
            self.register_buffer("position_table", sincos_table(config.position_table_size, width))
        self.dual_blocks = nn.ModuleList(DualBlock(config, i) for i in range(config.num_dual_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.final_modulation = Modulation(width, 2)
        self.image_out = nn.Linear(width, config.patch_dim)

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor | None = None,
                reference: Tensor | None = None, repulsion: Repulsion | None = None, groups: int = 1,
                skip_layers: tuple[int, ...] = ()) -> Tensor:
        """The velocity (noise − image) at a noise level.

        latent (B, C, H, W); sigma (B,) in [0, 1]; context (B, N, context_dim); pooled (B, pooled_dim); guidance (B,)
        for models distilled with it; reference (B, C, H', W'): Kontext's picture to edit → (B, C, H, W).
        `repulsion` pushes the samples of each group apart; the batch is `groups` groups of equal size, one after the
        other (with classifier-free guidance: two). `skip_layers` are dual-stream blocks to leave out (skip-layer
        guidance, SD3.5-medium). Raises ValueError for guidance or reference that the model does not take, sides that
        are no multiples of the patch, groups of unequal size, and blocks that the model does not have.
        """
        check_call(self.config, latent, guidance, reference, repulsion, groups, skip_layers)
        p, n, num_blocks = self.config.patch_size, context.shape[-2], self.config.num_blocks
        rows, columns = latent.shape[2] // p, latent.shape[3] // p
        dtype = self.image_in.weight.dtype

        vector = self.time_in(timestep_features(sigma).to(dtype)) + self.pooled_in(pooled.to(dtype))
        if self.guidance_in is not None:
            vector = vector + self.guidance_in(timestep_features(guidance).to(dtype))
        context = self.context_in(context.to(dtype))
        pictures = [latent] if reference is None else [latent, reference]
        image = self.image_in(torch.cat([patchify(picture.to(dtype), p) for picture in pictures], dim=1))
        rope = None
        if self.config.position == "table":
            image = image + crop_table(self.position_table, rows, columns).to(dtype)
        else:
            rope = self.rope(n, pictures, dtype)

        for index, block in enumerate(self.dual_blocks):
            if index not in skip_layers:
                push = repulsion.bind(index, num_blocks, groups) if repulsion else None
                context, image = block(context, image, vector, rope, push)
        if self.single_blocks:
            tokens = torch.cat([context, image], dim=1)
            for index, block in enumerate(self.single_blocks, start=len(self.dual_blocks)):
                push = repulsion.bind(index, num_blocks, groups, num_context=n) if repulsion else None
                tokens = block(tokens, vector, rope, push)
            image = tokens[:, n:]

        (final,) = self.final_modulation(vector)
        patches = self.image_out(modulate(image[:, : rows * columns], final))  # without a reference's tokens
        return rearrange(patches, "b (rows columns) (c p q) -> b c (rows p) (columns q)", rows=rows, p=p, q=p)

    def rope(self, n: int, pictures: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Cosine and sine of every token's rotary angles, computed on the CPU in float64: (2, n + m, k / 2).

        In the model's dtype, or float32 where that is wider. All n context tokens are at position 0.
        """
        p = self.config.patch_size
        grids = [grid_positions(i, x.shape[2] // p, x.shape[3] // p) for i, x in enumerate(pictures)]
        positions = torch.cat([torch.zeros_like(grids[0][:1]).expand(n, -1), *grids])
        angles = rope_angles(positions, self.config.rope_axes, self.config.rope_theta)
        wide = torch.promote_types(dtype, torch.float32)
        return torch.stack([angles.cos(), angles.sin()]).to(pictures[0].device, wide)


def patchify(picture: Tensor, p: int) -> Tensor:
    """Patches row by row: (b, c, H, W) → (b, m, c · p · p)."""
    return rearrange(picture, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=p, q=p)


def check_call(config: MMDiTConfig, latent: Tensor, guidance: Tensor | None, reference: Tensor | None,
               repulsion: Repulsion | None, groups: int, skip_layers: tuple[int, ...]) -> None:
    """Raises ValueError for what torch would not notice, or not say clearly; see `MMDiT.forward`."""
    for name, picture in (("latent", latent), ("reference", reference)):
        if picture is not None and (picture.ndim != 4 or picture.shape[1] != config.latent_channels):
            raise ValueError(f"{name} must be (B, {config.latent_channels}, H, W), got {tuple(picture.shape)}")
        if picture is not None and (picture.shape[2] % config.patch_size or picture.shape[3] % config.patch_size):
            raise ValueError(f"{name} sides {tuple(picture.shape[2:])} must be multiples of the patch size "
                             f"{config.patch_size}")
    if config.guidance_embedding != (guidance is not None):
        raise ValueError("this model was distilled with guidance: pass guidance (B,)" if guidance is None
                         else "this model has no guidance embedding: leave guidance out")
    if reference is not None and config.position != "rope":
        raise ValueError("a reference picture needs rotary positions (FLUX.1-Kontext); this model has a table")
    if repulsion is not None:
        repulsion.check_blocks(config.num_blocks)
    if groups < 1 or len(latent) % groups:
        raise ValueError(f"a batch of {len(latent)} cannot be {groups} groups of equal size")
    if any(not 0 <= i < config.num_dual_blocks for i in skip_layers):
        raise ValueError(f"skip_layers {tuple(skip_layers)} must lie in 0 … {config.num_dual_blocks - 1}, the "
                         "dual-stream blocks")
