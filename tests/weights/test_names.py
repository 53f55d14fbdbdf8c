"""Every table against the public checkpoints' own names and shapes, at full size, without any numbers."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdit import PRESETS, AutoencoderConfig, ClipConfig, MMDiTConfig, T5Config
from weights import configs, load
from weights.files import TensorEntry
from weights.names import CONV_1X1, OUTPUT_PATCH, PATCH_CONV, SWAP_HALVES, UNCHANGED, CheckpointError, Sizes
from weights.names_transformer import SD3_HUB, SD3_ORIGINAL
from weights.shapes import Shapes

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "manifests.json.gz").read_bytes()))
FLUX_VAE = AutoencoderConfig(scaling=0.3611, shift=0.1159)
SD3_VAE = AutoencoderConfig(scaling=1.5305, shift=0.0609)
CLIP_L = ClipConfig(projection_dim=None)
CLIP_G = ClipConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20, activation="gelu",
                    projection_dim=1280)

# manifest, the prefix of the part, what it is, its layout, its sizes
CASES = [
    ("bfl/flux1-dev", "", load.FLUX, "original", PRESETS["flux1-dev"]),
    ("bfl/flux1-schnell", "", load.FLUX, "original", PRESETS["flux1-schnell"]),
    ("bfl/ae", "", load.AUTOENCODER, "original", FLUX_VAE),
    ("diffusers/flux1-dev.transformer", "", load.FLUX, "hub", PRESETS["flux1-dev"]),
    ("diffusers/flux1-schnell.transformer", "", load.FLUX, "hub", PRESETS["flux1-schnell"]),
    ("diffusers/flux1.vae", "", load.AUTOENCODER, "hub", FLUX_VAE),
    ("diffusers/sd3-medium.transformer", "", load.SD3, "hub", PRESETS["sd3-medium"]),
    ("diffusers/sd3.5-medium.transformer", "", load.SD3, "hub", PRESETS["sd3.5-medium"]),
    ("diffusers/sd3.5-large.transformer", "", load.SD3, "hub", PRESETS["sd3.5-large"]),
    ("diffusers/sd3.vae", "", load.AUTOENCODER, "hub", SD3_VAE),
    ("sai/sd3_medium", "model.diffusion_model.", load.SD3, "original", PRESETS["sd3-medium"]),
    ("sai/sd3.5_medium", "model.diffusion_model.", load.SD3, "original", PRESETS["sd3.5-medium"]),
    ("sai/sd3.5_large", "model.diffusion_model.", load.SD3, "original", PRESETS["sd3.5-large-turbo"]),
    ("sai/sd3_medium", "first_stage_model.", load.AUTOENCODER, "original", SD3_VAE),
    ("sai/sd3.5_medium", "first_stage_model.", load.AUTOENCODER, "original", SD3_VAE),
    ("sai/sd3.5_large", "first_stage_model.", load.AUTOENCODER, "original", SD3_VAE),
    ("text/clip_l", "", load.CLIP_TEXT, "hub", CLIP_L),
    ("text/clip_l.projection", "", load.CLIP_TEXT, "hub", replace(CLIP_L, projection_dim=768)),
    ("text/clip_g", "", load.CLIP_TEXT, "hub", CLIP_G),
    ("text/t5xxl", "", load.T5_TEXT, "hub", T5Config()),
]
CLASSES = {load.FLUX: "FluxTransformer2DModel", load.SD3: "SD3Transformer2DModel", load.AUTOENCODER: "AutoencoderKL",
           load.CLIP_TEXT: "CLIPTextModelWithProjection", load.T5_TEXT: "T5EncoderModel"}


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}:{case[1]}")
def case(request):
    """(tensors of the part without their prefix, kind, layout, config, config.json of the manifest, prefix)."""
    name, prefix, kind, which, config = request.param
    manifest = MANIFESTS[name]
    tensors = {n.removeprefix(prefix): tuple(s) for n, s in manifest["tensors"].items() if n.startswith(prefix)}
    return tensors, kind, getattr(kind, which), config, manifest["config"], prefix


def on_meta(kind, config):
    with torch.device("meta"):
        return kind.module(config).state_dict()


def test_our_module_mapped_to_a_layout_is_the_public_file(case):
    tensors, kind, layout, config, _, _ = case
    parts = layout.split(on_meta(kind, config), configs.sizes_of(config))
    mapped = {theirs: tuple(part.shape) for _, theirs, part in parts}
    mapped |= {copy: mapped[name] for copy, name in layout.copies.items()}
    assert mapped == tensors


def test_the_public_file_mapped_to_our_names_is_our_module(case):
    tensors, kind, layout, config, _, _ = case
    used = []

    def read(name):
        used.append(name)
        return torch.empty(tensors[name], device="meta")

    for name, tensor in on_meta(kind, config).items():
        assert layout.join(name, configs.sizes_of(config), read).shape == tensor.shape, name
    assert sorted([*used, *layout.copies]) == sorted(tensors)  # each stored tensor is read, and once


def test_sizes_are_found_from_names_and_shapes(case):
    tensors, kind, layout, config, _, prefix = case
    stored = Shapes({n: TensorEntry(Path("file"), n, "F32", s) for n, s in tensors.items()}, layout, prefix)
    found = kind.fields(stored)
    if kind is load.AUTOENCODER and layout is kind.hub:  # whose latents only config.json describes
        assert found.items() <= vars(config).items()
        with pytest.raises(CheckpointError, match="scaling and shift"):
            kind.rest(stored, found)
    else:
        assert kind.config(**kind.rest(stored, found) | found) == config


def test_sizes_are_found_from_config_json(case):
    _, kind, layout, config, hub, _ = case
    if layout is not kind.hub:
        return
    projected = getattr(config, "projection_dim", 1) is not None
    hub = hub | {"_class_name": CLASSES[kind] if projected else "CLIPTextModel"}
    assert kind.from_hub(hub) == config
    assert kind.from_hub(configs.to_hub(config)) == config


@pytest.mark.parametrize("end", [2, 49407])
def test_clip_end_token_2_in_old_configs_is_the_highest_id(end):
    hub = MANIFESTS["text/clip_l"]["config"] | {"architectures": ["CLIPTextModel"], "eos_token_id": end}
    assert configs.clip_from_hub(hub).end_token == 49407


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


def test_hub_configs_that_our_modules_cannot_follow_are_refused():
    flux = configs.to_hub(PRESETS["flux1-dev"])
    for changes, message in [
        ({"_class_name": "PixArtTransformer2DModel"}, "describes a PixArtTransformer2DModel, expected Flux"),
        ({"out_channels": 384}, "out_channels 384, expected None or 64"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            configs.transformer_from_hub(flux | changes)
    with pytest.raises(CheckpointError, match="no entry num_layers"):
        configs.transformer_from_hub({k: v for k, v in flux.items() if k != "num_layers"})
    with pytest.raises(CheckpointError, match="qk_norm 'layer_norm'"):
        configs.transformer_from_hub(configs.to_hub(PRESETS["sd3.5-large"]) | {"qk_norm": "layer_norm"})
    with pytest.raises(CheckpointError, match="use_quant_conv True, expected False"):
        configs.autoencoder_from_hub(configs.to_hub(FLUX_VAE) | {"use_quant_conv": True})
    with pytest.raises(CheckpointError, match="feed_forward_proj 'relu'"):
        configs.t5_from_hub(configs.to_hub(T5Config()) | {"feed_forward_proj": "relu"})
    with pytest.raises(CheckpointError, match="expected CLIPTextModel"):
        configs.clip_from_hub(configs.to_hub(T5Config()))


def test_every_preset_is_covered_by_a_manifest():
    covered = {config for *_, config in CASES if isinstance(config, MMDiTConfig)}
    assert covered == set(PRESETS.values())  # Kontext has the sizes of dev, turbo those of large
