"""The image autoencoder: images (b, 3, H, W) in [-1, 1] <-> latents (b, c, H/8, W/8), FLUX.2's (b, 4c, H/16, W/16).

Model: R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, in the 16-channel form
of SD3 and FLUX.1 and the 32-channel form of FLUX.2. Letters: b batch, c channels, y and x pixel rows and columns.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Generator, Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AutoencoderConfig:
    """The sizes of an autoencoder and the normalization of its latents; the defaults are FLUX.1's.

    SD3's are the same sizes with `scaling=1.5305, shift=0.0609`; FLUX.2's `latent_channels=32, scaling=1.0, shift=0.0,
    patch_size=2`, the small decoder's `decoder_channels=(96, 192, 384, 384)`. `channels` has the width at each
    resolution, from the image's to the latent's, each half the one before.

    With `patch_size` p > 1, as in FLUX.2, encoder and decoder have a 1x1 convolution at the latent, the p x p patches
    of the latent become channels, (b, p²c, H/8p, W/8p), and each of these is normalized by its stored mean and
    variance, instead of scaling and shift. Raises ValueError where `norm_groups` does not divide the widths, or the
    decoder has other resolutions.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 16
    blocks_per_level: int = 2  # in the encoder; the decoder has one more
    norm_groups: int = 32
    scaling: float = 0.3611
    shift: float = 0.1159
    patch_size: int = 1
    decoder_channels: tuple[int, ...] | None = None  # None: the encoder's

    def __post_init__(self):
        for widths in (self.channels, self.decoder_channels or self.channels):
            if not widths or any(width % self.norm_groups for width in widths):
                raise ValueError(
                    f"AutoencoderConfig.channels {widths} must each be a multiple of norm_groups {self.norm_groups}"
                )
        if self.decoder_channels and len(self.decoder_channels) != len(self.channels):
            raise ValueError(
                f"AutoencoderConfig.decoder_channels {self.decoder_channels} must be as many as channels "
                f"{self.channels}: a width for each resolution"
            )

    @property
    def downscale(self) -> int:
        """Pixels of the image's side per position of the latent's: 8 for SD3 and FLUX.1, 16 for FLUX.2."""
        return self.patch_size * 2 ** (len(self.channels) - 1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3x3 convolution, added to a shortcut; (b, c_in, y, x) -> (b, c_out, y, x)."""

    def __init__(self, c_in: int, c_out: int, norm_groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(norm_groups, c_in, eps=1e-6)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm_2 = nn.GroupNorm(norm_groups, c_out, eps=1e-6)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, added to its input; (b, c, y, x) -> the same."""

    def __init__(self, width: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c y x -> b 1 (y x) c")
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        tokens = self.out(F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(tokens, "b 1 (y x) c -> b c y x", y=x.shape[2])


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution; (b, c, y, x) -> the same."""

    def __init__(self, width: int, norm_groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, norm_groups)
        self.attention = SpatialAttention(width, norm_groups)
        self.block_2 = ResidualBlock(width, width, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Downsample(nn.Conv2d):
    """Halve both sides by a 3x3 convolution of stride 2; (b, c, y, x) -> (b, c, y/2, x/2)."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # one column right, one row below, none left or above


class Upsample(nn.Conv2d):
    """Double both sides by repetition, then a 3x3 convolution; (b, c, y, x) -> (b, c, 2y, 2x)."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks, the first of which changes the width, then a change of resolution, but for the last level:
    (b, c_in, y, x) -> (b, c_out, y/2, x/2), or 2y and 2x in the decoder."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, norm_groups: int, resample: nn.Module):
        super().__init__()
        widths = [c_in] + [c_out] * num_blocks
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, norm_groups) for a, b in pairwise(widths)))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.blocks(x))


class Encoder(nn.Module):
    """Image (b, 3, H, W) -> mean and log-variance of its latent, on the channel axis (b, 2c, H/8, W/8)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        down = [*map(Downsample, widths[:-1]), nn.Identity()]
        self.levels = nn.Sequential(*(Level(*sizes, config.blocks_per_level, groups, resample)
                                      for sizes, resample in zip(pairwise(widths[:1] + widths), down, strict=True)))
        self.middle = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)
        self.latent_conv = latent_conv(2 * config.latent_channels, config)

    def forward(self, image: Tensor) -> Tensor:
        x = self.middle(self.levels(self.conv_in(image)))
        return self.latent_conv(self.conv_out(F.silu(self.norm_out(x))))


class Decoder(nn.Module):
    """Unnormalized latent (b, c, H/8, W/8) -> image (b, 3, H, W); its levels run from the coarsest to the finest."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = (config.decoder_channels or config.channels)[::-1], config.norm_groups
        self.latent_conv = latent_conv(config.latent_channels, config)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], groups)
        up = [*map(Upsample, widths[:-1]), nn.Identity()]
        self.levels = nn.Sequential(*(Level(*sizes, config.blocks_per_level + 1, groups, resample)
                                      for sizes, resample in zip(pairwise(widths[:1] + widths), up, strict=True)))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.levels(self.middle(self.conv_in(self.latent_conv(latent))))
        return self.conv_out(F.silu(self.norm_out(x)))


def latent_conv(channels: int, config: AutoencoderConfig) -> nn.Module:
    """FLUX.2's 1x1 convolution of the latent; SD3 and FLUX.1 have none."""
    return nn.Conv2d(channels, channels, 1) if config.patch_size > 1 else nn.Identity()


class Autoencoder(nn.Module):
    """Images to normalized latents and back; the transformer works on these latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.patch_size > 1:
            channels = config.latent_channels * config.patch_size**2
            self.register_buffer("latent_mean", torch.zeros(channels))
            self.register_buffer("latent_variance", torch.ones(channels))

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The Gaussian of an image's latent: mean and log-variance, each (b, c, H/8, W/8), not normalized.

        `image` (b, 3, H, W) in [-1, 1]; the log-variance is clamped to [-30, 20]. Raises ValueError for other
        channels, or a side that is not a multiple of `config.downscale`.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"The encoder takes images of shape (batch, 3, height, width), not {tuple(image.shape)}")
        height, width = image.shape[2:]
        if height % self.config.downscale or width % self.config.downscale or 0 in (height, width):
            raise ValueError(
                f"The image is {height} x {width} pixels: crop or resize it to multiples of {self.config.downscale}"
            )
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """The normalized latent (b, c, H/8, W/8), FLUX.2's (b, 4c, H/16, W/16), of an image (b, 3, H, W) in [-1, 1].

        Without a generator it is the posterior's mean, with one a sample. Raises ValueError as `posterior` does.
        """
        z, logvar = self.posterior(image)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
            z = z + torch.exp(0.5 * logvar) * noise
        p = self.config.patch_size
        if p == 1:
            return (z - self.config.shift) * self.config.scaling
        mean, deviation = self._statistics()
        return ((rearrange(z, "b c (y py) (x px) -> b (c py px) y x", py=p, px=p) - mean) / deviation).to(z.dtype)

    def decode(self, latent: Tensor) -> Tensor:
        """The image (b, 3, H, W) of a normalized latent as `encode` returns it; about [-1, 1], not clamped.

        Raises ValueError for other channels.
        """
        p = self.config.patch_size
        channels = p**2 * self.config.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise ValueError(
                f"The decoder takes latents of shape (batch, {channels}, height, width), not {tuple(latent.shape)}"
            )
        if p == 1:
            return self.decoder(latent / self.config.scaling + self.config.shift)
        mean, deviation = self._statistics()
        z = (latent * deviation + mean).to(latent.dtype)  # the statistics may be stored in a wider dtype
        return self.decoder(rearrange(z, "b (c py px) y x -> b c (y py) (x px)", py=p, px=p))

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the patches, (p²c, 1, 1)."""
        return self.latent_mean[:, None, None], torch.sqrt(self.latent_variance + 1e-4)[:, None, None]
