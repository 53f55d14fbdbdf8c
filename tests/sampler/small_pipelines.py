"""Small random pipelines of diffusers, saved as hub folders, with the tokenizers of the bundled checkpoint."""

import shutil

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from PIL import Image

import weights
from sampler import Pipeline

TOKENIZERS = weights.BUNDLED["tiny-sd3"]
FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SD3_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}


def vae(latents, levels=3):
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=(8, 16, 16) if levels == 3 else (4,) + (8,) * (levels - 1), layers_per_block=1,
        latent_channels=16, norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False, **latents,
    )


def clip(tokenizer, width, kind, activation="quick_gelu"):
    end = tokenizer.eos_token_id
    return kind(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, projection_dim=width,
        hidden_act=activation,
    ))


def t5(width):
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=128, d_model=width, d_kv=12, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    )).eval()  # or it drops a tenth of its states


def tokenizers():
    """CLIP-L's, CLIP-G's and T5's."""
    kinds = (transformers.CLIPTokenizer, transformers.CLIPTokenizer, transformers.T5Tokenizer)
    return [kind.from_pretrained(TOKENIZERS / f"tokenizer{n}") for kind, n in zip(kinds, ("", "_2", "_3"), strict=True)]


def randomize(model):
    """No zero bias, no norm of ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def flux(kind=diffusers.FluxPipeline, guidance=True, levels=3, blocks=2):
    torch.manual_seed(0)
    clip_l, _, spiece = tokenizers()
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, base_shift=0.5, max_shift=1.15),
        vae=vae(FLUX_LATENTS, levels),
        text_encoder=clip(clip_l, 32, transformers.CLIPTextModel), tokenizer=clip_l,
        text_encoder_2=t5(48), tokenizer_2=spiece,
        transformer=randomize(FluxTransformer2DModel(
            in_channels=64, num_layers=blocks, num_single_layers=blocks, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(8, 12, 12),
        )),
    )  # fmt: skip


def sd3(qk_norm=None, dual_attention=(), with_t5=True):
    torch.manual_seed(0)
    clip_l, clip_g, spiece = tokenizers()
    return diffusers.StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(SD3_LATENTS),
        text_encoder=clip(clip_l, 32, transformers.CLIPTextModelWithProjection), tokenizer=clip_l,
        text_encoder_2=clip(clip_g, 40, transformers.CLIPTextModelWithProjection, "gelu"), tokenizer_2=clip_g,
        text_encoder_3=t5(96) if with_t5 else None, tokenizer_3=spiece if with_t5 else None,
        transformer=randomize(SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=4, attention_head_dim=32,
            num_attention_heads=2, joint_attention_dim=96, caption_projection_dim=64, pooled_projection_dim=72,
            pos_embed_max_size=24, qk_norm=qk_norm, dual_attention_layers=dual_attention,
        )),
    )  # fmt: skip


def saved(theirs, folder):
    """diffusers' pipeline, and ours, loaded from the folder that it saved."""
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        if isinstance(getattr(theirs, tokenizer.name), transformers.T5Tokenizer):
            # transformers 5 writes tokenizer.json alone; the public folders hold spiece.model
            for name in ("spiece.model", "tokenizer_config.json"):
                shutil.copy(TOKENIZERS / "tokenizer_3" / name, tokenizer)
    return theirs, Pipeline.load(folder)


def photo(width, height):
    """A picture with a gradient along each side and something fine on it."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    channels = torch.stack([255 * x / width, 255 * y / height, 128 + 100 * torch.sin(x * y / 50)], dim=-1)
    return Image.frombytes("RGB", (width, height), bytes(channels.byte().flatten().tolist()))


def pixels(pictures):
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in pictures])


def assert_same_pictures(found, expected):
    """Within 2 of 255: float32 on both sides, sums in other orders, and one rounding to 8 bits."""
    found, expected = pixels(found), pixels(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    assert expected.std() > 5  # there is something to see


def assert_other_pictures(found, base):
    """Something that is asked for shows."""
    assert np.abs(pixels(found) - pixels(base)).max() > 10


def latents_of(pipeline, calls):
    """The final latent of each call of a pipeline, as its autoencoder sees it."""
    decode, latents = pipeline.autoencoder.decode, []
    pipeline.autoencoder.decode = lambda latent: latents.append(latent) or decode(latent)
    try:
        for call in calls:
            pipeline(**call)
    finally:
        del pipeline.autoencoder.decode
    return latents
