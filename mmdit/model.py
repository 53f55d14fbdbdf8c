"""MMDiT: a noisy latent, its noise level and a prompt go in, the velocity comes out."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from repulsion import Repulsion

from .blocks import DualBlock, SingleBlock
from .config import MMDiTConfig
from .layers import MLP, Modulation, modulate, timestep_features
from .position import crop_table, grid_positions, rope_angles, sincos_table, text_positions


class MMDiT(nn.Module):
    """The multimodal diffusion transformer of Stable Diffusion 3, FLUX.1 and FLUX.2; `MMDiTConfig` selects which."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        width, bias = config.hidden_size, config.bias
        self.image_in = nn.Linear(config.patch_dim, width, bias)
        self.context_in = nn.Linear(config.context_dim, width, bias)
        self.time_in = MLP(256, width, width, nn.SiLU(), bias)
        self.pooled_in = MLP(config.pooled_dim, width, width, nn.SiLU(), bias) if config.pooled_dim else None
        self.guidance_in = MLP(256, width, width, nn.SiLU(), bias) if config.guidance_embedding else None
        shared = {"context": 6, "image": 6, "single": 3} if config.shared_modulation else {}
        self.shared_modulation = nn.ModuleDict({name: Modulation(width, parts, bias) for name, parts in shared.items()})
        if config.position == "table":
            self.register_buffer("position_table", sincos_table(config.position_table_size, width))
        self.dual_blocks = nn.ModuleList(DualBlock(config, i) for i in range(config.num_dual_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.final_modulation = Modulation(width, 2, bias)
        self.image_out = nn.Linear(width, config.patch_dim, bias)

    def forward(self, latent: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor | None = None,
                guidance: Tensor | None = None, reference: Tensor | Sequence[Tensor] | None = None,
                repulsion: Repulsion | None = None, groups: int = 1, skip_layers: tuple[int, ...] = ()) -> Tensor:
        """The velocity (noise − image) at a noise level.

        latent (B, C, H, W); sigma (B,) in [0, 1]; context (B, N, context_dim); pooled (B, pooled_dim), which FLUX.2 has
        not; guidance (B,) for models distilled with it; reference (B, C, H', W'), or several of different sizes: the
        pictures to edit (Kontext, FLUX.2) → (B, C, H, W).
        `repulsion` pushes the samples of each group apart; the batch is `groups` groups of equal size, one after the
        other (with classifier-free guidance: two). `skip_layers` are dual-stream blocks to leave out (skip-layer
        guidance, SD3.5-medium). Raises ValueError for a pooled, guidance or reference that the model does not take,
        or needs; sides that are no multiples of the patch; groups of unequal size; and blocks that the model lacks.
        """
        references = [] if reference is None else [reference] if isinstance(reference, Tensor) else [*reference]
        check_call(self.config, latent, pooled, guidance, references, repulsion, groups, skip_layers)
        p, n, num_blocks = self.config.patch_size, context.shape[-2], self.config.num_blocks
        rows, columns = latent.shape[2] // p, latent.shape[3] // p
        dtype = self.image_in.weight.dtype

        embedding = self.time_in(timestep_features(sigma).to(dtype))
        if self.pooled_in is not None:
            embedding = embedding + self.pooled_in(pooled.to(dtype))
        if self.guidance_in is not None:
            embedding = embedding + self.guidance_in(timestep_features(guidance).to(dtype))
        # what a block's modulation reads: the embedding, or, in FLUX.2, what the shared modulations made of it
        vector = {name: layer(embedding) for name, layer in self.shared_modulation.items()} or embedding
        context = self.context_in(context.to(dtype))
        pictures = [latent, *references]
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

        (final,) = self.final_modulation(embedding)
        patches = self.image_out(modulate(image[:, : rows * columns], final))  # without the references' tokens
        return rearrange(patches, "b (rows columns) (c p q) -> b c (rows p) (columns q)", rows=rows, p=p, q=p)

    def rope(self, n: int, pictures: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Cosine and sine of every token's rotary angles, computed on the CPU in float64: (2, n + m, k / 2).

        In the model's dtype, or float32 where that is wider.
        """
        p, step, axes = self.config.patch_size, self.config.reference_step, len(self.config.rope_axes)
        grids = [grid_positions(i * step, x.shape[2] // p, x.shape[3] // p, axes) for i, x in enumerate(pictures)]
        positions = torch.cat([text_positions(n, axes), *grids])
        angles = rope_angles(positions, self.config.rope_axes, self.config.rope_theta)
        wide = torch.promote_types(dtype, torch.float32)
        return torch.stack([angles.cos(), angles.sin()]).to(pictures[0].device, wide)


def patchify(picture: Tensor, p: int) -> Tensor:
    """Patches row by row: (b, c, H, W) → (b, m, c · p · p)."""
    return rearrange(picture, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=p, q=p)


def check_call(config: MMDiTConfig, latent: Tensor, pooled: Tensor | None, guidance: Tensor | None,
               references: list[Tensor], repulsion: Repulsion | None, groups: int,
               skip_layers: tuple[int, ...]) -> None:
    """Raises ValueError for what torch would not notice, or not say clearly; see `MMDiT.forward`."""
    for name, picture in (("latent", latent), *(("reference", picture) for picture in references)):
        if picture.ndim != 4 or picture.shape[1] != config.latent_channels:
            raise ValueError(f"{name} must be (B, {config.latent_channels}, H, W), got {tuple(picture.shape)}")
        if picture.shape[2] % config.patch_size or picture.shape[3] % config.patch_size:
            raise ValueError(f"{name} sides {tuple(picture.shape[2:])} must be multiples of the patch size "
                             f"{config.patch_size}")
    if (config.pooled_dim is not None) != (pooled is not None):
        raise ValueError("this model reads a pooled text vector: pass pooled (B, pooled_dim)" if pooled is None
                         else "this model reads no pooled text vector: leave pooled out")
    if config.guidance_embedding != (guidance is not None):
        raise ValueError("this model was distilled with guidance: pass guidance (B,)" if guidance is None
                         else "this model has no guidance embedding: leave guidance out")
    if references and config.position != "rope":
        raise ValueError("a reference picture needs rotary positions (FLUX.1-Kontext); this model has a table")
    if repulsion is not None:
        repulsion.check_blocks(config.num_blocks)
    if groups < 1 or len(latent) % groups:
        raise ValueError(f"a batch of {len(latent)} cannot be {groups} groups of equal size")
    if any(not 0 <= i < config.num_dual_blocks for i in skip_layers):
        raise ValueError(f"skip_layers {tuple(skip_layers)} must lie in 0 … {config.num_dual_blocks - 1}, the "
                         "dual-stream blocks")
