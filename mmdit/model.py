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
    """The multimodal diffusion transformer of Stable Diffusion 3 and FLUX.1; `MMDiTConfig` says which."""

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

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor,
                guidance: Tensor | None = None, reference: Tensor | None = None,
                repulsion: Repulsion | None = None, groups: int = 1, skip_layers: tuple[int, ...] = ()) -> Tensor:
        """The velocity (noise − image) at a noise level.

        latent (B, C, H, W); timestep (B,) in [0, 1], which is σ; context (B, N, context_dim); pooled (B, pooled_dim);
        guidance (B,) for models distilled with it; reference (B, C, H', W'): Kontext's picture to edit → (B, C, H, W).
        `repulsion` pushes the samples of each group apart; the batch is `groups` groups of equal size, one after the
        other (with classifier-free guidance: two). `skip_layers` are dual-stream blocks to leave out (skip-layer
        guidance, SD3.5-medium). Raises ValueError where a shape does not fit.
        """
        self._check(latent, timestep, context, pooled, guidance, reference, repulsion, groups, skip_layers)
        p, n = self.config.patch_size, context.shape[1]
        rows, columns = latent.shape[2] // p, latent.shape[3] // p
        dtype = self.image_in.weight.dtype

        vector = self.time_in(timestep_features(timestep).to(dtype)) + self.pooled_in(pooled.to(dtype))
        if self.guidance_in is not None:
            vector = vector + self.guidance_in(timestep_features(guidance).to(dtype))
        context = self.context_in(context.to(dtype))
        image, angles = self._embed(latent.to(dtype), None if reference is None else reference.to(dtype), n)

        for index, block in enumerate(self.dual_blocks):
            if index in skip_layers:
                continue
            here = repulsion if repulsion and repulsion.acts_in(index, self.config.num_blocks) else None
            context, image = block(context, image, vector, angles, here, groups)
        if self.single_blocks:
            tokens = torch.cat([context, image], dim=1)
            for index, block in enumerate(self.single_blocks, start=len(self.dual_blocks)):
                here = repulsion if repulsion and repulsion.acts_in(index, self.config.num_blocks) else None
                tokens = block(tokens, vector, n, angles, here, groups)
            image = tokens[:, n:]

        image = image[:, : rows * columns]  # a reference has done its work
        patches = self.image_out(modulate(image, *self.final_modulation(vector)))
        return rearrange(patches, "b (rows columns) (c p q) -> b c (rows p) (columns q)", rows=rows, p=p, q=p)

    def _embed(self, latent: Tensor, reference: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
        """Patches as tokens that know where they are, and the rotary angles of all tokens (None with a table)."""
        p = self.config.patch_size
        tokens, positions = [], [torch.zeros(n, 3, dtype=torch.float64, device=latent.device)]  # text stands at 0
        for index, picture in enumerate([latent] if reference is None else [latent, reference]):
            rows, columns = picture.shape[2] // p, picture.shape[3] // p
            patches = rearrange(picture, "b c (rows p) (columns q) -> b (rows columns) (c p q)", p=p, q=p)
            tokens.append(self.image_in(patches))
            positions.append(grid_positions(index, rows, columns, latent.device))
        image = torch.cat(tokens, dim=1)
        if self.config.position == "table":
            return image + crop_table(self.position_table, rows, columns).to(image.dtype), None
        return image, rope_angles(torch.cat(positions), self.config.rope_axes, self.config.rope_theta)

    def _check(self, latent, timestep, context, pooled, guidance, reference, repulsion, groups, skip_layers) -> None:
        config, b = self.config, latent.shape[0] if latent.ndim else 0
        wanted = {
            "latent": (latent, ("B", config.latent_channels, "H", "W")),
            "timestep": (timestep, (b,)),
            "context": (context, (b, "N", config.context_dim)),
            "pooled": (pooled, (b, config.pooled_dim)),
            "guidance": (guidance, (b,)),
            "reference": (reference, (b, config.latent_channels, "H'", "W'")),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(tensor).__name__}")
            fits = tensor.ndim == len(shape) and 0 not in tensor.shape
            fits = fits and all(isinstance(s, str) or s == t for s, t in zip(shape, tensor.shape, strict=True))
            if not fits:
                expected = ", ".join(map(str, shape))
                raise ValueError(f"{name} must have the shape ({expected}), got ({', '.join(map(str, tensor.shape))})")
        for name, picture in (("latent", latent), ("reference", reference)):
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
        if groups < 1 or b % groups:
            raise ValueError(f"a batch of {b} cannot be {groups} groups of equal size")
        if any(not 0 <= i < config.num_dual_blocks for i in skip_layers):
            raise ValueError(f"skip_layers {tuple(skip_layers)} must lie in 0 … {config.num_dual_blocks - 1}, the "
                             "dual-stream blocks")
