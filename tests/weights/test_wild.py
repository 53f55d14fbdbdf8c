"""Files as people have them: other names, prefixes, leftovers, cut downloads. Each kind was met in the wild."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, FLUX, SD3, T5, VAE, randomize, same_tensors
from sparse import shapes_of, sparse_file, sparse_hub_folder

import weights
from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import CheckpointError

CONFIGS = {"transformer": FLUX, "autoencoder": VAE, "clip": CLIP, "t5": None}
LOAD = {"transformer": weights.load_transformer, "autoencoder": weights.load_autoencoder,
        "clip": weights.load_text_encoder, "t5": weights.load_text_encoder}


@pytest.fixture
def modules(tmp_path):
    """Small networks and their files in the original layouts, by role."""
    networks = {"transformer": MMDiT(FLUX), "autoencoder": Autoencoder(VAE), "clip": ClipTextEncoder(CLIP),
                "t5": T5Encoder(T5)}
    save = {"transformer": weights.save_transformer, "autoencoder": weights.save_autoencoder}
    for role, network in networks.items():
        save.get(role, weights.save_text_encoder)(randomize(network), tmp_path / f"{role}.safetensors")
    return {role: (network, tmp_path / f"{role}.safetensors") for role, network in networks.items()}


def rewrite(file, change):
    """The file again, with other names: `change` maps a name to its new one."""
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def test_norms_of_queries_and_keys_named_weight(modules):
    network, file = modules["transformer"]
    rewrite(file, lambda name: re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", name))
    assert any(name.endswith("query_norm.weight") for name in load_file(file))
    same_tensors(weights.load_transformer(file, FLUX).state_dict(), network.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "diffusion_model.", "transformer.", "model.", "a.b.c."])
@pytest.mark.parametrize("role", CONFIGS)
def test_one_prefix_before_every_name(modules, role, prefix):
    network, file = modules[role]
    rewrite(file, lambda name: prefix + name)
    same_tensors(LOAD[role](file, CONFIGS[role]).state_dict(), network.state_dict())


@pytest.mark.parametrize(("role", "stray"), [
    ("transformer", "optimizer.state.0.exp_avg"), ("transformer", "global_step"), ("transformer", "ema.decay"),
    ("autoencoder", "loss.discriminator.main.0.weight"), ("autoencoder", "epoch"),
    ("t5", "decoder.block.0.layer.0.SelfAttention.q.weight"), ("t5", "lm_head.weight"),
    ("clip", "vision_model.encoder.layers.0.self_attn.q_proj.weight"), ("clip", "visual_projection.weight"),
])
def test_what_belongs_to_no_network_is_passed_over_and_said(modules, role, stray):
    network, file = modules[role]
    save_file(load_file(file) | {stray: torch.ones(1)}, file)
    with pytest.warns(UserWarning, match=rf"1 stray tensors passed over, first {re.escape(stray)}"):
        same_tensors(LOAD[role](file, CONFIGS[role]).state_dict(), network.state_dict())
    assert weights.inspect_checkpoint(file).parts[role].unused == (stray,)


def test_a_tensor_that_would_change_the_numbers_is_no_stray(modules):
    for role, name in [("transformer", "double_blocks.0.img_attn.norm.value_norm.scale"),
                       ("transformer", "txt_norm.scale"),
                       ("t5", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight")]:
        file = modules[role][1]
        whole = load_file(file)
        save_file(whole | {name: torch.ones(1)}, file)
        with pytest.raises(CheckpointError, match=rf"1 tensors the model has no place for, first {re.escape(name)}"):
            LOAD[role](file, CONFIGS[role])
        save_file(whole, file)


def test_an_sft_file_is_a_safetensors_file(modules):
    network, file = modules["autoencoder"]
    file = file.rename(file.with_suffix(".sft"))
    same_tensors(weights.load_autoencoder(file, VAE).state_dict(), network.state_dict())


def test_hub_names_in_one_file_take_the_family_they_are_used_with(tmp_path):
    network = Autoencoder(replace(VAE, channels=(32, 64), norm_groups=32, latent_channels=16))
    weights.save_autoencoder(network, tmp_path / "hub", "hub")
    file = (tmp_path / "hub" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "flux_vae.safetensors")
    with pytest.raises(CheckpointError, match=r"flux_vae.*scaling and shift of these latents are not known"):
        weights.load_autoencoder(file)
    for family, scaling in [("flux", 0.3611), ("sd3", 1.5305)]:
        loaded = weights.load_autoencoder(file, family=family)
        assert loaded.config.scaling == scaling
        same_tensors(loaded.state_dict(), network.state_dict())


def test_an_interrupted_download_is_called_that(tmp_path):
    folder = sparse_hub_folder(tmp_path / "FLUX.1-dev", "flux", "diffusers/flux1-dev.transformer")
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    found = weights.inspect_checkpoint(folder)
    assert found.missing.keys() == {"t5"}
    with pytest.raises(FileNotFoundError, match=r"lacks t5 .*text_encoder_2 is missing: an interrupted download"):
        found.check()


# ---- folders with several models


@pytest.fixture
def shelf(tmp_path):
    """One folder with FLUX.1's file, its autoencoder, SD3.5's merged file, a foreign and a damaged one."""
    merged = shapes_of("sai/sd3.5_large") | shapes_of("text/clip_l.projection", "text_encoders.clip_l.transformer.")
    sparse_file(tmp_path / "sd3.5_large_incl_clips.safetensors", merged, "F16")
    sparse_file(tmp_path / "flux1-dev.safetensors", shapes_of("bfl/flux1-dev"))
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"), "F32")
    sparse_file(tmp_path / "a_vae_of_sd1.safetensors", shapes_of("bfl/ae") | {"quant_conv.weight": (8, 8, 1, 1)})
    sparse_file(tmp_path / "my style.safetensors", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 8)})
    sparse_file(tmp_path / "ViT-L-14-text.safetensors", shapes_of("text/clip_l"))
    sparse_file(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", shapes_of("text/t5xxl"), "F8_E4M3")
    (tmp_path / "t5xxl_fp16.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    return tmp_path


def test_of_several_models_the_family_and_the_name_choose(shelf):
    found = weights.inspect_checkpoint(shelf / "flux1-dev.safetensors")
    assert {role: part.path.name for role, part in found.parts.items()} == {
        "transformer": "flux1-dev.safetensors", "autoencoder": "ae.safetensors",
        "clip_l": "ViT-L-14-text.safetensors", "t5": "t5xxl_fp8_e4m3fn.safetensors"}
    refused = {place.name: str(error) for place, error in found.beside.items() if isinstance(error, Exception)}
    assert refused.keys() == {"a_vae_of_sd1.safetensors", "my style.safetensors", "t5xxl_fp16.safetensors"}
    assert "is a LoRA" in refused["my style.safetensors"]
    assert "an autoencoder of Stable Diffusion 1" in refused["a_vae_of_sd1.safetensors"]
    sd3 = weights.inspect_checkpoint(shelf / "sd3.5_large_incl_clips.safetensors")
    own = {role: part.path.name for role, part in sd3.parts.items() if "sd3.5" in part.path.name}
    assert own.keys() == {"transformer", "autoencoder", "clip_l"}


def test_sd3_s_autoencoder_is_never_flux_s(shelf):
    (shelf / "ae.safetensors").unlink()
    found = weights.inspect_checkpoint(shelf / "flux1-dev.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks autoencoder \(vae/ or ae.safetensors\), tokenizer .*is a LoRA"):
        found.check()


# ---- variants


@pytest.mark.parametrize(("path", "manifest", "variant", "told"), [
    ("flux1-dev.safetensors", "bfl/flux1-dev", "flux1-dev", "by its name"),
    ("my-kontext.safetensors", "bfl/flux1-dev", "flux1-kontext-dev", "by its name"),
    ("any.safetensors", "bfl/flux1-dev", "flux1-dev", "assumed"),
    ("flux-dev-de-distill.safetensors", "bfl/flux1-schnell", "flux1-dev-de-distill", "by its name"),
    ("flux_dev_undistilled.safetensors", "bfl/flux1-schnell", "flux1-dev-de-distill", "by its name"),
    ("any.safetensors", "bfl/flux1-schnell", "flux1-schnell", "assumed"),
    ("kontext/a/b/c/any.safetensors", "bfl/flux1-dev", "flux1-dev", "assumed"),  # folders further up do not count
    ("kontext/any.safetensors", "bfl/flux1-dev", "flux1-kontext-dev", "by its name"),
    ("any.safetensors", "sai/sd3_medium", "sd3-medium", ""),
])
def test_a_variant_that_is_guessed_says_so(tmp_path, path, manifest, variant, told):
    file = sparse_file(tmp_path / "x" / "y" / path, shapes_of(manifest))
    found = weights.inspect_checkpoint(file)
    assert found.variant == variant and found.told.startswith(told) and bool(found.told) == bool(told)
    other = {"flux": "flux1-kontext-dev", "sd3": "sd3.5-large"}[found.family]
    given = weights.inspect_checkpoint(file, variant=other)
    assert (given.variant, given.told.split(",")[0]) == (other, "as given")
    with pytest.raises(CheckpointError, match="variant must be one of flux1-kontext-dev, .* got 'flux2'"):
        weights.inspect_checkpoint(file, variant="flux2")


# ---- what cannot be loaded


@pytest.mark.parametrize(("tensors", "dtype", "what"), [
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (16, 64)}, "BF16", "is a LoRA"),
    ({"controlnet_blocks.0.weight": (64, 64), "single_transformer_blocks.0.attn.to_q.weight": (64, 64)}, "BF16",
     "is a ControlNet"),
    ({"redux_up.weight": (64, 16), "redux_down.weight": (16, 64)}, "BF16", "is FLUX.1-Redux, an adapter"),
    ({"distilled_guidance_layer.in_proj.weight": (64, 64)}, "BF16", "is Chroma"),
    (shapes_of("bfl/flux1-dev") | {"img_in.weight": (3072, 384)}, "BF16", r"one for more inputs \(Fill"),
    (shapes_of("bfl/flux1-dev") | {"double_blocks.0.img_attn.proj.weight.absmax": (9,)}, "BF16", "quantized to 4 or 8"),
    (shapes_of("bfl/flux1-dev") | {"double_blocks.0.img_attn.proj.weight_scale_2": ()}, "BF16", "a matrix in nvfp4"),
    (shapes_of("bfl/flux1-schnell"), "I8", r"tensor \S+ is I8 of shape .*, expected .* F64"),
    ({"vision_model.encoder.layers.0.self_attn.q_proj.weight": (64, 64), "vision_model.post_layernorm.bias": (64,)},
     "BF16", "is the image encoder of a CLIP"),
])
def test_what_cannot_be_loaded_is_named_for_what_it_is(tmp_path, tensors, dtype, what):
    file = sparse_file(tmp_path / "x.safetensors", tensors, dtype)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{what}"):
        weights.load_transformer(file)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{what}"):
        weights.open_part(weights.inspect_checkpoint(file).parts["transformer"])


def test_sd3_and_flux_alike_may_be_bare_or_not(tmp_path):
    network = randomize(MMDiT(SD3))
    weights.save_transformer(network, tmp_path / "x.safetensors")
    for prefix in ("", "net."):
        rewrite(tmp_path / "x.safetensors", lambda name, prefix=prefix: prefix + name.split("diffusion_model.")[-1])
        same_tensors(weights.load_transformer(tmp_path / "x.safetensors").state_dict(), network.state_dict())
        rewrite(tmp_path / "x.safetensors", lambda name, prefix=prefix: name.removeprefix(prefix))
