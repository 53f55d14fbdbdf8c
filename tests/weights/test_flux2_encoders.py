"""FLUX.2's autoencoder and text decoders: recorded outputs of the published code, and files as they are published."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKLFlux2
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import TOLERANCE, difference, draw, randomize, same_tensors
from sparse import shapes_of, sparse_file

from mmdit import Autoencoder, AutoencoderConfig, DecoderConfig, TextDecoder
from weights import (
    CheckpointError,
    inspect_checkpoint,
    load_autoencoder,
    load_text_encoder,
    open_part,
    read_tekken,
    save_autoencoder,
    save_text_encoder,
)

DATA = Path(__file__).parents[1] / "data"
VAE = AutoencoderConfig(channels=(8, 16, 24), latent_channels=4, blocks_per_level=2, norm_groups=4, scaling=1.0,
                        shift=0.0, patch_size=2)
SMALL_DECODER = replace(VAE, decoder_channels=(4, 12, 16))
QWEN = DecoderConfig(vocab_size=60, hidden_size=20, intermediate_size=28, num_heads=4, num_kv_heads=2, head_dim=6)
MISTRAL = replace(QWEN, qk_norm=False, layers=(10, 20, 30), norm_eps=1e-5, rope_theta=1e9)


@pytest.fixture(autouse=True)
def no_warnings():
    """What is never read is passed over without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def golden(name):
    """The tensors of a recording, and the sizes of its model."""
    with safe_open(DATA / f"{name}.io.safetensors", "pt") as opened:
        return load_file(DATA / f"{name}.io.safetensors"), json.loads(opened.metadata()["config"])


def decoder_config(sizes):
    return DecoderConfig(
        sizes["vocab_size"], sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"],
        sizes["num_key_value_heads"], sizes["head_dim"], tuple(sizes["layers"]), sizes["family"] == "qwen3",
        sizes["rms_norm_eps"], sizes["rope_theta"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "downscale"), [("flux2-bfl-ae", 4), ("flux2-bfl-ae-decoder", 8)])
def test_the_autoencoder_is_the_published_one(name, downscale):
    io, _ = golden(name)
    model = load_autoencoder(DATA / f"{name}.safetensors", dtype=torch.float32)
    assert model.config.downscale == downscale
    assert difference(model.encode(io["image"]), io["latent"]) < TOLERANCE
    assert difference(model.decode(io["latent_given"]), io["decoded"]) < TOLERANCE


@torch.no_grad()
def test_the_stored_dtype_serves_too():
    """Weights in bfloat16, the statistics beside them in float32."""
    io, _ = golden("flux2-bfl-ae")
    model = load_autoencoder(DATA / "flux2-bfl-ae.safetensors")
    assert model.latent_mean.dtype == torch.float32
    for found, wanted in [(model.encode(io["image"].bfloat16()), io["latent"]),
                          (model.decode(io["latent_given"].bfloat16()), io["decoded"])]:
        # bfloat16 keeps 8 bits (4e-3 a rounding); some twenty layers in sequence.
        assert found.dtype == torch.bfloat16 and difference(found.float(), wanted) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2-qwen3", "flux2-mistral"])
def test_the_decoders_are_the_published_ones(name):
    io, sizes = golden(name)
    model = load_text_encoder(DATA / f"{name}.safetensors", decoder_config(sizes))
    assert difference(model(io["ids"], io["mask"]), io["context"]) < TOLERANCE


def test_sizes_without_config_json():
    assert load_text_encoder(DATA / "flux2-qwen3.safetensors").config == decoder_config(golden("flux2-qwen3")[1])
    with pytest.raises(CheckpointError, match="num_heads 0 is not a multiple"):  # no q/k norms, so 128-wide heads
        load_text_encoder(DATA / "flux2-mistral.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_mistral_from_the_hub_s_folder(tmp_path, nested):
    """Its config.json describes a model that reads pictures, of which the decoder is one half."""
    io, sizes = golden("flux2-mistral")
    rope = {"rope_theta": sizes.pop("rope_theta")}
    text = {**sizes, **({"rope_parameters": {"rope_type": "default", **rope}} if nested else rope)}
    hub = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, "vision_config": {"head_dim": 4}}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    names = load_file(DATA / "flux2-mistral.safetensors")
    if nested:  # as transformers' own modules are named
        names = {name.replace("language_model.model.", "model.language_model."): x for name, x in names.items()}
    beside = {f"{'model.' * nested}vision_tower.patch_conv.weight": torch.zeros(2, 2)}
    save_file({**names, **beside}, tmp_path / "model.safetensors")
    model = load_text_encoder(tmp_path)
    assert model.config == decoder_config({**sizes, **rope})
    assert difference(model(io["ids"], io["mask"]), io["context"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("config", [QWEN, MISTRAL], ids=["qwen3", "mistral"])
def test_what_is_behind_the_last_layer_is_never_read(tmp_path, config):
    model = randomize(TextDecoder(config))
    save_text_encoder(model, tmp_path / "cut.safetensors")
    cut = load_file(tmp_path / "cut.safetensors")
    last = f"model.layers.{config.num_layers - 1}."
    behind = {name.replace(last, f"model.layers.{config.num_layers}."): torch.zeros(3, dtype=torch.uint8)
              for name in cut if name.startswith(last)}
    names = ("model.norm.weight", "lm_head.weight", "tekken_model")
    ignored = {name: torch.zeros(1, dtype=torch.uint8) for name in names}
    save_file({**cut, **behind, **ignored}, tmp_path / "whole.safetensors")
    for name in ("cut", "whole"):
        again = load_text_encoder(tmp_path / f"{name}.safetensors", config)
        same_tensors(again.state_dict(), model.state_dict())
    found = inspect_checkpoint(tmp_path / "whole.safetensors")
    assert [*found.parts] == ["text"] and not found.parts["text"].unused


@pytest.mark.parametrize(("manifest", "config"), [
    ("text/qwen3-4b", DecoderConfig()),
    ("text/qwen3-8b", DecoderConfig(hidden_size=4096, intermediate_size=12288)),
    *((f"text/mistral-small-3-24b{form}",
       DecoderConfig(131072, 5120, 32768, layers=(10, 20, 30), qk_norm=False, norm_eps=1e-5, rope_theta=1e9))
      for form in ("", ".comfy"))])
def test_single_files_of_full_size(tmp_path, manifest, config):
    """Up to 48 GB, as ComfyUI's folders have them without a config.json; most of it is never read."""
    tensors = shapes_of(manifest) | {"tekken_model": (1000,)}
    file = sparse_file(tmp_path / "text.safetensors", tensors, lambda name, _: "U8" if "tekken" in name else "BF16")
    found = inspect_checkpoint(file)
    assert [*found.parts] == ["text"]
    stored = open_part(found.parts["text"])
    assert stored.config == config and stored.dtype == torch.bfloat16 and not stored.part.unused
    names = [entry.name for entry in stored.part.entries.values()]
    assert len(names) == 1 + config.num_layers * (11 if config.qk_norm else 9)


def test_the_tokenizer_in_comfyui_s_file(tmp_path):
    content = json.dumps({"config": {}, "vocab": []}).encode()
    tensors = {"tekken_model": torch.tensor([*content], dtype=torch.uint8)}
    save_file(tensors, tmp_path / "mistral.safetensors")
    assert read_tekken(tmp_path / "mistral.safetensors") == content
    assert read_tekken(DATA / "flux2-qwen3.safetensors") is None


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.strange.weight"])
def test_other_tensors_of_the_layers_are_refused(tmp_path, name):
    save_text_encoder(randomize(TextDecoder(QWEN)), tmp_path / "cut.safetensors")
    save_file({**load_file(tmp_path / "cut.safetensors"), name: torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=f"1 tensors the model has no place for, first {name}"):
        load_text_encoder(tmp_path / "more.safetensors")


def test_a_decoder_that_is_cut_short_is_refused(tmp_path):
    save_text_encoder(randomize(TextDecoder(replace(QWEN, layers=(4,)))), tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 253 of 298 tensors, first model\.layers\.4\."):
        load_text_encoder(tmp_path / "short.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scaled_float8(tmp_path, dtype):
    """As ComfyUI stores them: matrices of the layers in float8, each with a scale."""
    model = randomize(TextDecoder(QWEN))
    save_text_encoder(model, tmp_path / "cut.safetensors")
    stored = {}
    for name, tensor in load_file(tmp_path / "cut.safetensors").items():
        matrix = "layers." in name and tensor.ndim == 2
        stored[name] = (tensor / 0.01).to(torch.float8_e4m3fn) if matrix else tensor.bfloat16()
        if matrix:
            stored[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
            stored[name.replace(".weight", ".comfy_quant")] = torch.zeros(4, dtype=torch.uint8)
    save_file(stored, tmp_path / "float8.safetensors")
    ids = torch.arange(24).view(2, 12)
    found = load_text_encoder(tmp_path / "float8.safetensors", dtype=dtype)(ids)
    # float8 keeps 4 bits (0.06 a rounding) of each weight; sums over some twenty of them and 27 layers.
    assert found.dtype == torch.bfloat16 and difference(found.float(), model(ids)) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("config", [VAE, SMALL_DECODER], ids=["flux2", "small-decoder"])
def test_autoencoders_are_written_and_read_in_both_layouts(tmp_path, config):
    model = randomize(Autoencoder(config))
    model.latent_mean.copy_(draw(16))
    model.latent_variance.copy_(draw(16).square() + 0.1)
    for path, layout in [(tmp_path / "ae.safetensors", "original"), (tmp_path / "vae", "hub")]:
        save_autoencoder(model, path, layout)
        again = load_autoencoder(path, config if layout == "original" else None)  # 4 groups: only config.json says so
        assert again.config == config
        same_tensors(again.state_dict(), model.state_dict())
    theirs = AutoencoderKLFlux2.from_pretrained(tmp_path / "vae").eval()
    image = draw(2, 3, 16, 24)
    mean = torch.nn.functional.pixel_unshuffle(theirs.encode(image).latent_dist.mode(), 2)
    deviation = torch.sqrt(theirs.bn.running_var + theirs.config.batch_norm_eps)[:, None, None]
    wanted = (mean - theirs.bn.running_mean[:, None, None]) / deviation
    assert difference(model.encode(image), wanted) < TOLERANCE
    latent = torch.nn.functional.pixel_shuffle(wanted * deviation + theirs.bn.running_mean[:, None, None], 2)
    assert difference(model.decode(wanted), theirs.decode(latent).sample) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("config", [QWEN, MISTRAL], ids=["qwen3", "mistral"])
def test_decoders_are_written_for_transformers(tmp_path, config):
    model = randomize(TextDecoder(config))
    save_text_encoder(model, tmp_path / "text_encoder", "hub")
    again = load_text_encoder(tmp_path / "text_encoder")
    assert again.config == config
    same_tensors(again.state_dict(), model.state_dict())
    cls = transformers.Qwen3Model if config.qk_norm else transformers.MistralModel
    theirs = cls.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32).eval()
    ids = torch.arange(24).view(2, 12)
    states = theirs(ids, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[number] for number in config.layers[:2]], dim=-1)  # the third is behind the final norm
    assert difference(model(ids)[..., :2 * config.hidden_size], wanted) < TOLERANCE


def test_the_statistics_tell_flux2_s_autoencoder(tmp_path):
    save_autoencoder(randomize(Autoencoder(VAE)), tmp_path / "ae.safetensors")
    assert inspect_checkpoint(tmp_path).parts["autoencoder"].family == "flux2"
    assert inspect_checkpoint(DATA / "flux2-qwen3.safetensors").parts["text"].family is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"), ({"attention_bias": True}, "attention_bias"),
    ({"rope_theta": None}, "rope_theta None"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"text_config": "none"}, "mapping"),
])
def test_decoder_configs_that_cannot_be_followed_are_refused(tmp_path, changes, message):
    save_text_encoder(randomize(TextDecoder(QWEN)), tmp_path / "text_encoder", "hub")
    file = tmp_path / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_text_encoder(tmp_path / "text_encoder")
