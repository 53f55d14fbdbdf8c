"""Every table against the public checkpoints' own names and shapes, at full size, without any numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse import MANIFESTS, shapes_of

from mmdit import PRESETS, AutoencoderConfig, ClipConfig, DecoderConfig, MMDiTConfig, T5Config, on_meta
from weights import CheckpointError, configs
from weights.detect import AUTOENCODER, CLIP, DECODER, FLUX, FLUX2, SD3, T5, recognize
from weights.files import TensorEntry
from weights.layouts import CONV_1X1, OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, UNCHANGED, Sizes
from weights.load import without_rest
from weights.tables import SD3_HUB, SD3_ORIGINAL

FLUX_VAE = AutoencoderConfig(scaling=0.3611, shift=0.1159)
SD3_VAE = AutoencoderConfig(scaling=1.5305, shift=0.0609)
FLUX2_VAE = AutoencoderConfig(latent_channels=32, scaling=1.0, shift=0.0, patch_size=2)
SMALL_DECODER = replace(FLUX2_VAE, decoder_channels=(96, 192, 384, 384))
CLIP_L = ClipConfig(projection_dim=None)
CLIP_G = ClipConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, activation="gelu",
                    projection_dim=1280)

QWEN3_4B = DecoderConfig()
QWEN3_8B = DecoderConfig(hidden_size=4096, intermediate_size=12288)
MISTRAL = DecoderConfig(vocab_size=131072, hidden_size=5120, intermediate_size=32768, layers=(10, 20, 30),
                        qk_norm=False, norm_eps=1e-5, rope_theta=1e9)

# manifest, the prefix of the part, its kind, which of its layouts, its sizes
CASES = [
    ("bfl/flux1-dev", "", FLUX, 0, PRESETS["flux1-dev"]),
    ("bfl/flux1-schnell", "", FLUX, 0, PRESETS["flux1-schnell"]),
    ("bfl/ae", "", AUTOENCODER, 0, FLUX_VAE),
    ("diffusers/flux1-dev.transformer", "", FLUX, 1, PRESETS["flux1-dev"]),
    ("diffusers/flux1-schnell.transformer", "", FLUX, 1, PRESETS["flux1-schnell"]),
    ("diffusers/flux1.vae", "", AUTOENCODER, 1, FLUX_VAE),
    ("bfl/flux2-dev", "", FLUX2, 0, PRESETS["flux2-dev"]),
    ("bfl/flux2-klein-9b", "", FLUX2, 0, PRESETS["flux2-klein-9b"]),
    ("bfl/flux2-klein-4b", "", FLUX2, 0, PRESETS["flux2-klein-4b"]),
    ("diffusers/flux2-dev.transformer", "", FLUX2, 1, PRESETS["flux2-dev"]),
    ("diffusers/flux2-klein-9b.transformer", "", FLUX2, 1, PRESETS["flux2-klein-base-9b"]),
    ("diffusers/flux2-klein-4b.transformer", "", FLUX2, 1, PRESETS["flux2-klein-base-4b"]),
    ("diffusers/sd3-medium.transformer", "", SD3, 1, PRESETS["sd3-medium"]),
    ("diffusers/sd3.5-medium.transformer", "", SD3, 1, PRESETS["sd3.5-medium"]),
    ("diffusers/sd3.5-large.transformer", "", SD3, 1, PRESETS["sd3.5-large"]),
    ("diffusers/sd3.vae", "", AUTOENCODER, 1, SD3_VAE),
    ("sai/sd3_medium", "model.diffusion_model.", SD3, 0, PRESETS["sd3-medium"]),
    ("sai/sd3.5_medium", "model.diffusion_model.", SD3, 0, PRESETS["sd3.5-medium"]),
    ("sai/sd3.5_large", "model.diffusion_model.", SD3, 0, PRESETS["sd3.5-large-turbo"]),
    ("sai/sd3_medium", "first_stage_model.", AUTOENCODER, 0, SD3_VAE),
    ("sai/sd3.5_medium", "first_stage_model.", AUTOENCODER, 0, SD3_VAE),
    ("sai/sd3.5_large", "first_stage_model.", AUTOENCODER, 0, SD3_VAE),
    ("text/clip_l", "", CLIP, 1, CLIP_L),
    ("text/clip_l.projection", "", CLIP, 1, replace(CLIP_L, projection_dim=768)),
    ("text/clip_g", "", CLIP, 1, CLIP_G),
    ("text/t5xxl", "", T5, 1, T5Config()),
    ("bfl/flux2-ae", "", AUTOENCODER, 0, FLUX2_VAE),
    ("bfl/flux2-ae-small-decoder", "", AUTOENCODER, 0, SMALL_DECODER),
    ("diffusers/flux2.vae", "", AUTOENCODER, 1, FLUX2_VAE),
    ("diffusers/flux2-small-decoder.vae", "", AUTOENCODER, 1, SMALL_DECODER),
    ("text/qwen3-4b", "model.", DECODER, 1, QWEN3_4B),
    ("text/qwen3-8b", "model.", DECODER, 1, QWEN3_8B),
    ("text/mistral-small-3-24b", "language_model.model.", DECODER, 1, MISTRAL),
    ("text/mistral-small-3-24b.comfy", "model.", DECODER, 1, MISTRAL),
]
CLASSES = {FLUX: "FluxTransformer2DModel", FLUX2: "Flux2Transformer2DModel", SD3: "SD3Transformer2DModel",
           AUTOENCODER: "AutoencoderKL", CLIP: "CLIPTextModelWithProjection", T5: "T5EncoderModel"}


def recognized(manifest, hub=None):
    """The parts of a public file, with this config.json beside it."""
    entries = {name: TensorEntry(Path("file"), name, "F32", shape) for name, shape in shapes_of(manifest).items()}
    return recognize(entries, Path("file"), hub)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}:{case[1]}")
def case(request):
    """(the part as it is recognized in the file, its kind, which of its layouts, its sizes, config.json)."""
    name, prefix, kind, which, config = request.param
    hub = MANIFESTS[name]["config"]
    projected = getattr(config, "projection_dim", 1) is not None
    if hub and kind is DECODER:
        hub = {**hub, "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "Mistral3ForConditionalGeneration"]}
    elif hub:
        cls = CLASSES[kind] + "Flux2" * (getattr(config, "patch_size", 1) > 1 and kind is AUTOENCODER)
        hub = {**hub, "_class_name": cls if projected else "CLIPTextModel"}
    (part,) = [part for part in recognized(name, hub or None) if part.prefix == prefix]
    return without_rest(part, config.num_layers) if kind is DECODER else part, kind, which, config, hub or None


def stored_names(part):
    return {entry.name.removeprefix(part.prefix): entry.shape for entry in part.entries.values()}


def test_our_module_mapped_to_a_layout_is_the_public_file(case):
    part, kind, which, config, _ = case
    assert part.kind is kind and part.layout in (kind.layouts[0], kind.layouts[which])
    parts = kind.layouts[which].split(on_meta(kind.module, config).state_dict(), configs.sizes_of(config))
    assert {theirs: tuple(tensor.shape) for _, theirs, tensor in parts} == stored_names(part)


def test_the_public_file_mapped_to_our_names_is_our_module(case):
    part, kind, which, config, _ = case
    stored, sizes, used = stored_names(part), configs.sizes_of(config), []
    for name, tensor in on_meta(kind.module, config).state_dict().items():
        theirs, transform = kind.layouts[which].find(name, sizes)
        used += theirs
        tensors = [torch.empty(stored[their], device="meta") for their in theirs]
        assert transform.read(torch.cat(tensors), sizes.patch).shape == tensor.shape, name
    assert sorted(used) == sorted(stored)  # each stored tensor is read, and once


def test_sizes_are_found_from_names_and_shapes(case):
    part, kind, which, config, _ = case
    found = configs.fields(part)
    assert found.items() <= vars(config).items()
    if kind is AUTOENCODER and which and config.patch_size == 1:  # whose latents only config.json describes
        with pytest.raises(CheckpointError, match="scaling and shift"):
            configs.usual(part, found)
    else:
        assert kind.config(**configs.usual(part, found) | found) == config


def test_sizes_are_found_with_config_json(case):
    part, kind, which, config, hub = case
    if not which:
        return
    for written in (hub, configs.to_hub(config)):
        again = replace(part, layout=kind.layouts[which], config=written)  # T5's and CLIP's names do not tell it
        assert configs.find_config(again, None, None) == config


@pytest.mark.parametrize("end", [2, 49407])
def test_clip_end_token_2_in_old_configs_is_the_highest_id(end):
    hub = MANIFESTS["text/clip_l"]["config"] | {"architectures": ["CLIPTextModel"], "eos_token_id": end}
    assert configs.find_config(recognized("text/clip_l", hub)[0], None, None).end_token == 49407


def test_what_flux2_configs_leave_out_is_diffusers_default():
    hub = MANIFESTS["diffusers/flux2-dev.transformer"]["config"] | {"_class_name": CLASSES[FLUX2]}
    (part,) = recognized("diffusers/flux2-dev.transformer", hub)
    for key in ("axes_dims_rope", "rope_theta", "guidance_embeds", "eps", "mlp_ratio", "patch_size", "out_channels"):
        del hub[key]
    assert configs.find_config(replace(part, config=hub), None, None) == PRESETS["flux2-dev"]


@pytest.mark.parametrize(("transform", "stored", "ours"), [
    # (scale, shift) of width 2 in the file
    (SWAP_HALVES, torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 1, 2])),
    # patch rows (row, column, channel): the value names its place, e.g. 110 is row 1, column 1, channel 0
    (OUTPUT_PATCH, torch.tensor([0, 1, 10, 11, 100, 101, 110, 111]), torch.tensor([0, 10, 100, 110, 1, 11, 101, 111])),
    (PATCH_CONV, torch.arange(16).reshape(2, 2, 2, 2), torch.arange(16).reshape(2, 8)),
    (CONV_1X1, torch.arange(4).reshape(2, 2, 1, 1), torch.arange(4).reshape(2, 2)),
], ids=["swap_halves", "output_patch", "patch_conv", "conv_1x1"])
def test_transforms_do_what_they_say_and_back(transform, stored, ours):
    assert torch.equal(transform.read(stored, 2), ours)
    assert torch.equal(transform.write(ours, 2), stored)


def test_only_the_last_context_modulation_of_sd3_is_swapped_on_the_hub():
    sizes = Sizes(width=4, last=2)
    for block, transform in [(0, UNCHANGED), (1, UNCHANGED), (2, SWAP_HALVES)]:
        found = SD3_HUB.find(f"dual_blocks.{block}.context.modulation.bias", sizes)
        assert found == ([f"transformer_blocks.{block}.norm1_context.linear.bias"], transform)


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(CheckpointError, match="original SD3 layout has no place for single_blocks.0.linear_in.weight"):
        SD3_ORIGINAL.find("single_blocks.0.linear_in.weight", Sizes())


@pytest.mark.parametrize(("manifest", "config", "changes", "message"), [
    ("diffusers/flux1-dev.transformer", PRESETS["flux1-dev"], {"_class_name": "PixArtTransformer2DModel"},
     "config.json describes a PixArtTransformer2DModel, expected FluxTransformer2DModel or SD3Transf.*: give another"),
    ("diffusers/flux1-dev.transformer", PRESETS["flux1-dev"], {"patch_size": 2}, r"patch_size 2, expected .*: give"),
    ("diffusers/flux1-dev.transformer", PRESETS["flux1-dev"], {"axes_dims_rope": [64, 64]}, "rope_axes must be three"),
    ("diffusers/flux1-dev.transformer", PRESETS["flux1-dev"], {"_class_name": "Flux2Transformer2DModel"},
     "a Flux2Transformer2DModel, expected FluxTransformer2DModel or SD3Transf"),
    ("diffusers/flux2-dev.transformer", PRESETS["flux2-dev"], {"_class_name": "FluxTransformer2DModel"},
     "a FluxTransformer2DModel, expected Flux2Transformer2DModel: give another"),
    ("diffusers/flux2-dev.transformer", PRESETS["flux2-dev"], {"timestep_guidance_channels": 512}, "channels 512, exp"),
    ("diffusers/flux2-dev.transformer", PRESETS["flux2-dev"], {"rope_theta": "2000"}, "rope_theta '2000': download"),
    ("diffusers/sd3.5-large.transformer", PRESETS["sd3.5-large"], {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
    ("diffusers/flux1.vae", FLUX_VAE, {"use_quant_conv": True}, r"use_quant_conv True, expected .*False.*: give"),
    ("text/t5xxl", T5Config(), {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu', expected .*'gated-gelu'.*: g"),
    ("text/clip_l", CLIP_L, {"architectures": ["T5EncoderModel"]}, "a T5EncoderModel, expected CLIPTextModel or CLIPT"),
])
def test_hub_configs_that_our_modules_cannot_follow_are_refused(manifest, config, changes, message):
    (part,) = recognized(manifest, configs.to_hub(config))
    assert configs.find_config(part, None, None) == config
    part.config.update(changes)
    with pytest.raises(ValueError, match=message):
        configs.find_config(part, None, None)


def test_every_preset_is_covered_by_a_manifest():
    covered = {config for *_, config in CASES if isinstance(config, MMDiTConfig)}
    # Kontext has the sizes of dev, de-distill schnell's, turbo those of large, klein its base's
    assert covered == set(PRESETS.values())


@pytest.mark.parametrize(("manifest", "name", "key", "field", "value"), [
    ("text/t5xxl", "T5EncoderModel", "relative_attention_max_distance", "relative_max_distance", 128),
    ("diffusers/flux1.vae", "AutoencoderKL", "norm_num_groups", "norm_groups", 32),
    ("diffusers/flux1.vae", "AutoencoderKL", "shift_factor", "shift", 0.0),
])
def test_what_other_configs_leave_out_is_the_libraries_default(manifest, name, key, field, value):
    hub = {**MANIFESTS[manifest]["config"], "_class_name": name}
    hub.pop(key, None)
    part = recognized(manifest, hub)[0]
    assert getattr(configs.find_config(replace(part, layout=part.kind.layouts[1]), None, None), field) == value
