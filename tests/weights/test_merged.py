"""Merged files: transformer, autoencoder and text encoders in one, each under its prefix, as SD3's releases with text
encoders and as ComfyUI's files of FLUX.1 have them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, FLUX, SD3, T5, VAE, randomize, same_tensors

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import (
    CheckpointError,
    inspect_checkpoint,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)

CLIP_L = replace(CLIP, projection_dim=CLIP.hidden_size)
CLIP_G = replace(CLIP, hidden_size=40, num_heads=5, num_layers=2, activation="gelu", projection_dim=24)
SD3_VAE = replace(VAE, scaling=1.5305, shift=0.0609)
SAVE = {MMDiT: save_transformer, Autoencoder: save_autoencoder, ClipTextEncoder: save_text_encoder,
        T5Encoder: save_text_encoder}


def tensors_of(module, prefix, folder):
    """A module's tensors under its original names, after `prefix` instead of what is written before them."""
    SAVE[type(module)](module, folder / "part.safetensors")
    tensors = load_file(folder / "part.safetensors")
    for written in ("model.diffusion_model.", "first_stage_model."):
        tensors = {name.removeprefix(written): tensor for name, tensor in tensors.items()}
    return {prefix + name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}


class Merged:
    """One file of modules, each in the given dtype under the given prefix."""

    def __init__(self, folder, modules):
        self.path, self.modules, tensors = folder / "merged.safetensors", {}, {}
        for seed, (role, (module, dtype, prefix)) in enumerate(modules.items()):
            self.modules[role] = randomize(module, seed).to(dtype)
            tensors |= tensors_of(self.modules[role], prefix, folder)
        save_file(tensors, self.path)

    def add(self, tensors):
        save_file(load_file(self.path) | tensors, self.path)

    def load(self, role, **options):
        config = self.modules[role].config
        load = {"transformer": load_transformer, "autoencoder": load_autoencoder}.get(role)
        return load(self.path, config, **options) if load else load_text_encoder(
            self.path, config, **{"which": role, **options})


@pytest.fixture
def sd3(tmp_path):
    """sd3_medium_incl_clips_t5xxlfp8.safetensors, small."""
    merged = Merged(tmp_path, {
        "transformer": (MMDiT(SD3), torch.float16, "model.diffusion_model."),
        "autoencoder": (Autoencoder(SD3_VAE), torch.float16, "first_stage_model."),
        "clip_l": (ClipTextEncoder(CLIP_L), torch.float16, "text_encoders.clip_l.transformer."),
        "clip_g": (ClipTextEncoder(CLIP_G), torch.float16, "text_encoders.clip_g.transformer."),
        "t5": (T5Encoder(T5), torch.float8_e4m3fn, "text_encoders.t5xxl.transformer."),
    })
    merged.add({f"text_encoders.{name}.logit_scale": torch.ones(()) for name in ("clip_l", "clip_g", "t5xxl")})
    merged.add({"text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(20)})
    return merged


@pytest.fixture(params=["model.diffusion_model.", ""], ids=["prefix", "no prefix"])
def flux(tmp_path, request):
    """flux1-dev-fp8.safetensors, small."""
    return Merged(tmp_path, {
        "transformer": (MMDiT(FLUX), torch.float8_e4m3fn, request.param),
        "autoencoder": (Autoencoder(VAE), torch.float32, "vae."),
        "clip_l": (ClipTextEncoder(CLIP), torch.float16, "text_encoders.clip_l.transformer."),
        "t5": (T5Encoder(T5), torch.float8_e4m3fn, "text_encoders.t5xxl.transformer."),
    })


def assert_each_loader_gets_its_part(merged):
    for role, module in merged.modules.items():
        loaded = merged.load(role)
        assert type(loaded) is type(module) and loaded.config == module.config
        for dtype in (torch.float32, torch.bfloat16):
            wanted = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
            same_tensors(merged.load(role, dtype=dtype).state_dict(), wanted)
        if module.state_dict().popitem()[1].element_size() > 1:  # float8 that stays has a test file of its own
            same_tensors(loaded.state_dict(), module.state_dict())


def test_sd3_with_text_encoders(sd3):
    assert_each_loader_gets_its_part(sd3)


def test_flux_as_comfyui_merges_it(flux):
    assert_each_loader_gets_its_part(flux)


def test_latents_are_those_of_the_family(sd3):
    """Of the sizes that the release has, no config is needed: the prefix tells whose latents they are."""
    for prefix, scaling in [("first_stage_model.", 1.5305), ("vae.", 0.3611)]:
        vae = Autoencoder(replace(VAE, channels=(32, 32), norm_groups=32, latent_channels=16, blocks_per_level=1))
        others = {n: t for n, t in load_file(sd3.path).items() if not n.startswith(("first_stage_model.", "vae."))}
        save_file(others | tensors_of(vae, prefix, sd3.path.parent), sd3.path)
        loaded = load_autoencoder(sd3.path)
        assert loaded.config.scaling == scaling
        same_tensors(loaded.state_dict(), vae.state_dict())


def test_which_text_encoder_must_be_said(sd3):
    with pytest.raises(CheckpointError, match=r"merged\.safetensors holds several of these, clip_l \(.*say which='t5'"):
        sd3.load("clip_l", which=None)
    with pytest.raises(CheckpointError, match=r"merged\.safetensors holds no clip but transformer .*t5.*: give"):
        sd3.load("clip_l", which="clip")
    with pytest.raises(CheckpointError, match="config is a ClipConfig, expected a T5Config"):
        sd3.load("clip_l", which="t5")


def test_a_text_encoder_that_is_not_there(flux):
    with pytest.raises(CheckpointError, match=r"merged\.safetensors holds no clip_g but transformer .*t5.*: give"):
        flux.load("clip_l", which="clip_g")


def test_one_text_encoder_needs_no_choice(tmp_path):
    merged = Merged(tmp_path, {
        "transformer": (MMDiT(SD3), torch.float16, "model.diffusion_model."),
        "clip_g": (ClipTextEncoder(CLIP_G), torch.float16, "text_encoders.clip_g.transformer."),
    })
    same_tensors(merged.load("clip_g", which=None).state_dict(), merged.modules["clip_g"].state_dict())


def test_the_same_part_twice_is_ambiguous(sd3):
    prefix = "model.diffusion_model."
    sd3.add({n.removeprefix(prefix): t for n, t in load_file(sd3.path).items() if n.startswith(prefix)})
    with pytest.raises(CheckpointError, match=r"several transformers \(.*: \*, .*: model\.diffusion_model\.\*\): give"):
        sd3.load("transformer")


def test_what_belongs_to_no_part_is_passed_over_with_a_warning(sd3):
    names = ["cond_stage_model.x", "ema.decay", "text_encoders.clip_h.transformer.x", "first_stage_model.loss.x"]
    sd3.add({name: torch.ones(1) for name in names})
    for role in sd3.modules:
        with pytest.warns(UserWarning, match=r"merged\.safetensors: 4 stray tensors passed over, first cond"):
            same_tensors(sd3.load(role, dtype=torch.float32).state_dict(), sd3.modules[role].float().state_dict())
    (unused,) = {part.unused for part in inspect_checkpoint(sd3.path).parts.values()}
    assert sorted(unused) == sorted(names)


def test_what_is_strange_in_one_part_disturbs_no_other(sd3):
    strange = {"transformer": "model.diffusion_model.x", "autoencoder": "first_stage_model.x",
               "clip_l": "text_encoders.clip_l.transformer.x", "t5": "text_encoders.t5xxl.transformer.x"}
    sd3.add({name: torch.ones(1) for name in strange.values()})
    sd3.load("clip_g")
    for role, name in strange.items():
        with pytest.raises(CheckpointError, match=f"has 1 tensors the model has no place for, first {name}: is it a"):
            sd3.load(role)


def test_a_part_that_is_cut_short_names_its_tensor_in_full(sd3):
    gone = "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc2.bias"
    save_file({name: tensor for name, tensor in load_file(sd3.path).items() if name != gone}, sd3.path)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of \d+ tensors, first {gone} of shape \(40,\)"):
        sd3.load("clip_g")
    sd3.load("clip_l")
