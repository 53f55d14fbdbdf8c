"""Hub folders against the libraries that define them: the same outputs from diffusers' and transformers' models."""

from dataclasses import replace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from einops import rearrange
from safetensors.torch import load_file
from small_models import CLIP, FLUX, FLUX2, SD3, T5, TOLERANCE, VAE, difference, draw, randomize

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import (
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)

TRANSFORMERS = {
    "flux": FLUX, "flux, guidance": replace(FLUX, guidance_embedding=True),
    "flux2": FLUX2, "flux2, guidance": replace(FLUX2, guidance_embedding=True), "sd3": replace(SD3, qk_norm=False),
    "sd3.5": SD3, "sd3.5, dual": replace(SD3, dual_attention_blocks=(0, 1)),
}


def inputs_for(config):
    inputs = {
        "latent": draw(2, config.latent_channels, 6, 8), "sigma": torch.tensor([0.3, 0.9]),
        "context": draw(2, 5, config.context_dim, seed=2),
    }
    if config.pooled_dim is None:  # FLUX.2 takes references of several sizes
        inputs["reference"] = [draw(2, config.latent_channels, *size, seed=4) for size in ((3, 4), (5, 2))]
    else:
        inputs["pooled"] = draw(2, config.pooled_dim, seed=3)
    return inputs | ({"guidance": torch.tensor([3.5, 1.0])} if config.guidance_embedding else {})


def diffusers_transformer(config):
    sizes = {
        "num_layers": config.num_dual_blocks, "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads, "joint_attention_dim": config.context_dim,
    }
    if config.shared_modulation:
        return diffusers.Flux2Transformer2DModel(
            **sizes, in_channels=config.latent_channels, num_single_layers=config.num_single_blocks,
            mlp_ratio=config.mlp_ratio, guidance_embeds=config.guidance_embedding, axes_dims_rope=config.rope_axes,
        )
    sizes["pooled_projection_dim"] = config.pooled_dim
    if config.position == "rope":
        return diffusers.FluxTransformer2DModel(
            **sizes, in_channels=4 * config.latent_channels, num_single_layers=config.num_single_blocks,
            guidance_embeds=config.guidance_embedding, axes_dims_rope=config.rope_axes,
        )
    return diffusers.SD3Transformer2DModel(
        **sizes, in_channels=config.latent_channels, out_channels=config.latent_channels,
        caption_projection_dim=config.hidden_size, pos_embed_max_size=config.position_table_size, sample_size=16,
        qk_norm="rms_norm" if config.qk_norm else None, dual_attention_layers=config.dual_attention_blocks,
    )


def flux2_velocity(model, latent, sigma, context, reference, guidance=None):
    """Numbered by the functions of diffusers' own pipeline."""
    pipeline = diffusers.Flux2Pipeline
    packed = torch.cat([pipeline._pack_latents(picture) for picture in (latent, *reference)], dim=1)
    ids = [pipeline._prepare_latent_ids(latent)[:1], pipeline._prepare_image_ids([x[:1] for x in reference])]
    out = model(packed, context, sigma, torch.cat(ids, dim=1), pipeline._prepare_text_ids(context), guidance,
                return_dict=False)[0]
    rows, columns = latent.shape[2:]
    return rearrange(out[:, : rows * columns], "b (y x) c -> b c y x", y=rows)


def diffusers_velocity(model, latent, sigma, context, pooled=None, guidance=None, reference=None):
    if isinstance(model, diffusers.Flux2Transformer2DModel):
        return flux2_velocity(model, latent, sigma, context, reference, guidance)
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return model(latent, context, pooled, 1000 * sigma, return_dict=False)[0]
    rows, columns = latent.shape[2] // 2, latent.shape[3] // 2
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)
    packed = rearrange(latent, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2)
    out = model(packed, context, pooled, sigma, ids.reshape(-1, 3), torch.zeros(context.shape[1], 3), guidance,
                return_dict=False)[0]
    return rearrange(out, "b (y x) (c p q) -> b c (y p) (x q)", y=rows, p=2, q=2)


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
@torch.no_grad()
def test_transformers_saved_by_diffusers_give_its_outputs(tmp_path, config):
    theirs = randomize(diffusers_transformer(config))
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    ours = load_transformer(tmp_path)
    assert ours.config == config
    inputs = inputs_for(config)
    assert difference(ours(**inputs), diffusers_velocity(theirs, **inputs)) < TOLERANCE


@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
@torch.no_grad()
def test_transformers_saved_by_us_give_our_outputs_in_diffusers(tmp_path, config):
    ours = randomize(MMDiT(config))
    save_transformer(ours, tmp_path / "transformer", "hub", max_shard_bytes=200_000)
    kind = type(diffusers_transformer(config))
    theirs, report = kind.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected, or of another shape
    inputs = inputs_for(config)
    assert difference(diffusers_velocity(theirs.eval(), **inputs), ours(**inputs)) < TOLERANCE


def diffusers_vae(config):
    levels = len(config.channels)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.channels, layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_groups, scaling_factor=config.scaling,
        shift_factor=config.shift, use_quant_conv=False, use_post_quant_conv=False,
    )


def assert_same_autoencoder(ours, theirs):
    image, latent = draw(2, 3, 16, 24), draw(2, ours.config.latent_channels, 4, 6)
    assert difference(ours.posterior(image)[0], theirs.encode(image).latent_dist.mean) < TOLERANCE
    unscaled = latent / theirs.config.scaling_factor + theirs.config.shift_factor
    assert difference(ours.decode(latent), theirs.decode(unscaled).sample) < TOLERANCE


@torch.no_grad()
def test_autoencoders_agree_with_diffusers_both_ways(tmp_path):
    theirs = randomize(diffusers_vae(VAE))
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(tmp_path)
    assert ours.config == VAE
    assert_same_autoencoder(ours, theirs)

    ours = randomize(Autoencoder(VAE), seed=7)
    save_autoencoder(ours, tmp_path / "vae", "hub")
    assert_same_autoencoder(ours, diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"))


@torch.no_grad()
def test_original_autoencoders_agree_with_diffusers_conversion(tmp_path):
    """diffusers' own converter of original files is the witness for the reversed levels and the 1 x 1 convolutions."""
    ours = randomize(Autoencoder(VAE))
    save_autoencoder(ours, tmp_path / "ae.safetensors")
    theirs = diffusers_vae(VAE)
    converted = single_file_utils.convert_ldm_vae_checkpoint(load_file(tmp_path / "ae.safetensors"), theirs.config)
    theirs.load_state_dict(converted)
    assert_same_autoencoder(ours, theirs)



def clip_models(config):
    sizes = transformers.CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, hidden_act=config.activation,
        max_position_embeddings=config.max_positions, projection_dim=config.projection_dim or 32, bos_token_id=1,
        eos_token_id=config.end_token, pad_token_id=0,
    )
    kind = transformers.CLIPTextModelWithProjection if config.projection_dim else transformers.CLIPTextModel
    return kind, sizes


def assert_same_clip(ours, theirs):
    ids = torch.tensor([[1, 7, 3, 59, 59, 59], [1, 4, 4, 9, 30, 59]])
    found, wanted = ours(ids), theirs(ids, output_hidden_states=True)
    pooled = wanted.pooler_output if ours.config.projection_dim is None else wanted.text_embeds
    assert difference(found.last, wanted.last_hidden_state) < TOLERANCE
    assert difference(found.penultimate, wanted.hidden_states[-2]) < TOLERANCE
    assert difference(found.pooled, pooled) < TOLERANCE


@pytest.mark.parametrize("config", [CLIP, replace(CLIP, activation="gelu", projection_dim=16)], ids=["L", "G"])
@torch.no_grad()
def test_clip_agrees_with_transformers_both_ways(tmp_path, config):
    kind, sizes = clip_models(config)
    theirs = randomize(kind(sizes))
    theirs.save_pretrained(tmp_path / "a")
    ours = load_text_encoder(tmp_path / "a")
    assert ours.config == config
    assert_same_clip(ours, theirs)

    ours = randomize(ClipTextEncoder(config), seed=7)
    save_text_encoder(ours, tmp_path / "b", "hub")
    theirs, report = kind.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    assert_same_clip(ours, theirs)


@torch.no_grad()
def test_t5_agrees_with_transformers_both_ways(tmp_path):
    ids = torch.tensor([[7, 3, 1, 0, 0, 0], [4, 4, 9, 30, 2, 1]])
    theirs = randomize(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=4, d_ff=40, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
    )))
    theirs.save_pretrained(tmp_path / "a")
    ours = load_text_encoder(tmp_path / "a")
    assert ours.config == T5
    assert difference(ours(ids), theirs(ids).last_hidden_state) < TOLERANCE

    ours = randomize(T5Encoder(T5), seed=7)
    save_text_encoder(ours, tmp_path / "b", "hub", max_shard_bytes=4000)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path / "b")
    assert difference(ours(ids), theirs(ids).last_hidden_state) < TOLERANCE
