"""The same pipeline code on FLUX.1: small random checkpoints saved by diffusers, the same prompt and noise."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from einops import rearrange
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import weights
from repulsion import Repulsion
from sampler import Pipeline, starting_noise

TOKENIZERS = weights.EMBEDDED["tiny-sd3"]


@pytest.fixture(scope="module", params=["dev", "schnell"])
def both(request, tmp_path_factory):
    """A small random FLUX.1 pipeline in diffusers, and ours, loaded from what it saved."""
    torch.manual_seed(0)
    dev = request.param == "dev"
    clip, t5 = CLIPTokenizer.from_pretrained(TOKENIZERS / "tokenizer"), T5Tokenizer.from_pretrained(
        TOKENIZERS / "tokenizer_3")
    end = clip.eos_token_id
    theirs = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, base_shift=0.5, max_shift=1.15),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(
            vocab_size=len(clip), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=24, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        )),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(T5Config(
            vocab_size=128, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        )),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
            joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=dev, axes_dims_rope=(8, 12, 12),
        ),
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    # transformers 5 writes tokenizer.json alone; the public folders hold spiece.model
    shutil.copy(TOKENIZERS / "tokenizer_3" / "spiece.model", folder / "tokenizer_2")
    shutil.copy(TOKENIZERS / "tokenizer_3" / "tokenizer_config.json", folder / "tokenizer_2")
    return theirs, Pipeline.load(folder), dev


def test_the_same_prompt_and_noise_give_the_same_pictures(both):
    theirs, ours, dev = both
    noise = starting_noise(1, 3, (16, 8, 12))  # 32 × 48 pixels at a quarter
    guidance = {"guidance": 2.5} if dev else {}
    found = ours("a red circle and a star", 3, noise=noise, steps=5, height=32, width=48, **guidance)
    expected = theirs(
        "a red circle and a star", num_images_per_prompt=3, num_inference_steps=5, height=32, width=48,
        guidance_scale=2.5, max_sequence_length=24,
        latents=rearrange(noise, "b c (y p) (x q) -> b (y x) (c p q)", p=2, q=2),
    ).images  # fmt: skip
    found, expected = (np.stack([np.asarray(p, dtype=np.int16) for p in batch]) for batch in (found, expected))
    assert np.abs(found - expected).max() <= 2
    assert expected.std() > 5  # there is something to see


def test_defaults_follow_the_variant_and_repulsion_runs(both):
    _, ours, dev = both
    assert (ours.defaults.steps, ours.defaults.guidance) == ((28, 3.5) if dev else (4, None))
    calm, moved = (ours("a star", 2, steps=2, height=32, width=32, repulsion=push)
                   for push in (None, Repulsion(1e3, iterations=3)))
    assert any(a.tobytes() != b.tobytes() for a, b in zip(calm, moved, strict=True))


def test_distilled_guidance_takes_no_negative_prompt(both):
    _, ours, _ = both
    with pytest.raises(ValueError, match="negative_prompt needs"):
        ours("a star", 1, steps=1, height=32, width=32, negative_prompt="a circle")
