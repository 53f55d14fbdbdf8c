"""Autoencoder against diffusers' AutoencoderKL with the same random weights."""

import pytest
import torch
from diffusers import AutoencoderKL

from mmdit.autoencoder import Autoencoder, AutoencoderConfig

# Three levels, the last two of one width, so that blocks with and without a shortcut occur on both sides.
CONFIG = AutoencoderConfig(channels=(8, 16, 16), latent_channels=4, norm_groups=4, scaling=1.5305, shift=0.0609)

# In float64 both do the same arithmetic in another order: some hundred roundings of 1e-16.
TOLERANCE = 1e-13


def oracle() -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=CONFIG.channels,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=CONFIG.blocks_per_level,
        latent_channels=CONFIG.latent_channels,
        norm_num_groups=CONFIG.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases too, which start as ones and zeros
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.double().eval()


def our_name(name: str) -> str:
    """diffusers' parameter name as ours, but for the attention's q, k and v, which it keeps apart."""
    for old, new in {
        "down_blocks": "levels",
        "up_blocks": "levels",
        "resnets": "blocks",
        "downsamplers.0.conv": "resample",
        "upsamplers.0.conv": "resample",
        "mid_block": "middle",
        "middle.blocks.0": "middle.block_1",
        "middle.blocks.1": "middle.block_2",
        "attentions.0": "attention",
        "group_norm": "norm",
        "to_out.0": "out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "shortcut",
        "norm1": "norm_1",
        "norm2": "norm_2",
        "conv1": "conv_1",
        "conv2": "conv_2",
    }.items():
        name = name.replace(old, new)
    return name


def ours(model: AutoencoderKL) -> Autoencoder:
    state = {our_name(name): tensor for name, tensor in model.state_dict().items()}
    for half in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            qkv = [state.pop(f"{half}.middle.attention.to_{part}.{kind}") for part in "qkv"]
            state[f"{half}.middle.attention.qkv.{kind}"] = torch.cat(qkv)
    autoencoder = Autoencoder(CONFIG).double()
    autoencoder.load_state_dict(state)
    return autoencoder


def image() -> torch.Tensor:
    return torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_posterior_equals_diffusers():
    model = oracle()
    expected = model.encode(image()).latent_dist
    mean, logvar = ours(model).posterior(image())
    assert relative_error(mean, expected.mean) < TOLERANCE
    assert relative_error(logvar, expected.logvar) < TOLERANCE


@torch.no_grad()
def test_posterior_clamps_the_log_variance():
    model = oracle()
    model.encoder.conv_out.weight *= 1e3
    _, logvar = ours(model).posterior(image())
    assert relative_error(logvar, model.encode(image()).latent_dist.logvar) < TOLERANCE
    assert (logvar.min(), logvar.max()) == (-30, 20)


@torch.no_grad()
def test_encode_equals_diffusers_mean_and_sample():
    model = oracle()
    latent_dist = model.encode(image()).latent_dist
    autoencoder = ours(model)
    mean = (latent_dist.mode() - CONFIG.shift) * CONFIG.scaling
    assert relative_error(autoencoder.encode(image()), mean) < TOLERANCE
    sample = (latent_dist.sample(torch.Generator().manual_seed(7)) - CONFIG.shift) * CONFIG.scaling
    assert relative_error(autoencoder.encode(image(), torch.Generator().manual_seed(7)), sample) < TOLERANCE
    assert relative_error(sample, mean) > 0.1  # or the noise above proved nothing


@torch.no_grad()
def test_decode_equals_diffusers():
    model = oracle()
    latent = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = model.decode(latent / CONFIG.scaling + CONFIG.shift).sample
    assert relative_error(ours(model).decode(latent), expected) < TOLERANCE


@torch.no_grad()
def test_bfloat16_stays_near_float64():
    autoencoder = ours(oracle())
    latent = autoencoder.encode(image())
    expected = autoencoder.decode(latent)
    found = autoencoder.bfloat16().decode(latent.bfloat16())
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits (4e-3 a rounding); some forty layers in sequence, their errors adding like a random walk.
    assert relative_error(found.double(), expected) < 0.02


def test_downscale():
    assert CONFIG.downscale == 4


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 24, 42), "24 x 42 pixels: crop or resize it to multiples of 4"),
        ((1, 3, 0, 8), "0 x 8 pixels"),
        ((1, 4, 24, 40), r"\(batch, 3, height, width\), not \(1, 4, 24, 40\)"),
        ((3, 24, 40), r"not \(3, 24, 40\)"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder(CONFIG).encode(torch.zeros(shape))


def test_bad_latents():
    with pytest.raises(ValueError, match=r"\(batch, 4, height, width\), not \(1, 16, 6, 10\)"):
        Autoencoder(CONFIG).decode(torch.zeros(1, 16, 6, 10))


def test_bad_config():
    with pytest.raises(ValueError, match="multiple of norm_groups 32"):
        AutoencoderConfig(channels=(128, 48))
