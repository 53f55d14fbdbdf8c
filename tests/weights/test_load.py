"""Loading and saving against the official outputs, there and back again, and against misuse."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, FLUX, FLUX2, SD3, T5, TOLERANCE, VAE, difference, randomize, same_tensors

from mmdit import (
    PRESETS,
    Autoencoder,
    ClipConfig,
    ClipTextEncoder,
    MMDiT,
    MMDiTConfig,
    T5Encoder,
)
from weights import (
    CheckpointError,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)

DATA = Path(__file__).parents[1] / "data"
FLUX_GOLDEN = MMDiTConfig(hidden_size=64, num_heads=2, num_dual_blocks=2, num_single_blocks=2, context_dim=48,
                          pooled_dim=40, rope_axes=(8, 12, 12), guidance_embedding=True)


# ---- official outputs and round trips


FLUX2_DEV = replace(FLUX2, latent_channels=32, context_dim=48, guidance_embedding=True)
FLUX2_REFERENCE = replace(FLUX2, latent_channels=32, context_dim=48, rope_axes=(8, 4, 8, 12))
GOLDEN = [("sd3-sai-rms", None), ("sd3-sai-dual", None), ("flux-bfl-guidance", FLUX_GOLDEN),
          ("flux2-bfl-dev", FLUX2_DEV), ("flux2-bfl-reference", FLUX2_REFERENCE)]


@pytest.mark.parametrize(("name", "config"), GOLDEN)
def test_original_files_give_the_official_velocity(name, config):
    inputs = load_file(DATA / f"{name}.io.safetensors")
    velocity = inputs.pop("velocity")
    inputs["sigma"] = inputs.pop("timestep")  # as the official programs call it
    inputs = {key: tensor for key, tensor in inputs.items() if not key.startswith("kv.")}  # of another variant, 9B-KV
    if references := sorted(key for key in inputs if key.startswith("reference")):
        inputs["reference"] = [inputs.pop(key) for key in references]
    model = load_transformer(DATA / f"{name}.safetensors", config)
    with torch.no_grad():
        assert difference(model(**inputs), velocity) < TOLERANCE


@pytest.mark.parametrize("max_shard_bytes", [None, 300_000])
@pytest.mark.parametrize(("name", "config"), GOLDEN)
def test_original_to_hub_and_back_is_bit_identical(tmp_path, name, config, max_shard_bytes):
    model = load_transformer(DATA / f"{name}.safetensors", config)
    save_transformer(model, tmp_path / "transformer", "hub", max_shard_bytes)
    shards = len(list((tmp_path / "transformer").glob("*.safetensors")))
    assert shards > 5 if max_shard_bytes else shards == 1
    again = load_transformer(tmp_path)  # the folder around it, and no config: config.json has it
    assert again.config == model.config
    save_transformer(again, tmp_path / "x.safetensors")
    same_tensors(load_file(tmp_path / "x.safetensors"), load_file(DATA / f"{name}.safetensors"))


VARIANTS = {
    "flux": FLUX, "flux, guidance": replace(FLUX, guidance_embedding=True), "sd3": replace(SD3, qk_norm=False),
    "sd3.5": SD3, "sd3.5, dual": replace(SD3, dual_attention_blocks=(0, 1)),
    "flux2": FLUX2, "flux2, guidance": replace(FLUX2, guidance_embedding=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_hub_to_original_to_hub_to_original_changes_no_byte(tmp_path, config, dtype):
    def content(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    save_transformer(randomize(MMDiT(config)).to(dtype), tmp_path / "0", "hub")
    save_transformer(load_transformer(tmp_path / "0"), tmp_path / "1", "hub")
    if dtype.itemsize > 1:  # float8 outside of the blocks is widened, once
        assert content(tmp_path / "1") == content(tmp_path / "0")
    save_transformer(load_transformer(tmp_path / "1"), tmp_path / "1.safetensors")
    save_transformer(load_transformer(tmp_path / "1.safetensors", config), tmp_path / "2", "hub")
    assert content(tmp_path / "2") == content(tmp_path / "1")
    save_transformer(load_transformer(tmp_path / "2"), tmp_path / "2.safetensors")
    assert (tmp_path / "2.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()


@pytest.mark.parametrize("scaling", ["flux", "sd3"])
def test_autoencoder_and_text_encoders_come_back_bit_identical(tmp_path, scaling):
    vae = replace(VAE, latent_channels=16, norm_groups=8, channels=(8, 16, 32))
    vae = vae if scaling == "flux" else replace(vae, scaling=1.5305, shift=0.0609)
    for load, save, module in [
        (load_autoencoder, save_autoencoder, Autoencoder(vae)),
        (load_text_encoder, save_text_encoder, ClipTextEncoder(CLIP)),
        (load_text_encoder, save_text_encoder, ClipTextEncoder(replace(CLIP, projection_dim=16))),
        (load_text_encoder, save_text_encoder, T5Encoder(T5)),
    ]:
        save(randomize(module), tmp_path / "a.safetensors")
        first = load(tmp_path / "a.safetensors", module.config)
        save(first, tmp_path / "hub", "hub", max_shard_bytes=5000)
        second = load(tmp_path / "hub")
        assert second.config == module.config
        save(second, tmp_path / "b.safetensors")
        same_tensors(second.state_dict(), module.state_dict())
        same_tensors(load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "a.safetensors"))


def test_dtypes_are_kept_or_cast(tmp_path):
    model = MMDiT(FLUX).to(torch.bfloat16)
    save_transformer(model, tmp_path / "transformer", "hub")
    kept = load_transformer(tmp_path).state_dict()
    same_tensors(kept, model.state_dict())
    cast = load_transformer(tmp_path, dtype=torch.float32).state_dict()
    same_tensors(cast, model.float().state_dict())


def test_every_parameter_is_filled_and_still_trains(tmp_path):
    save_transformer(MMDiT(SD3), tmp_path / "x.safetensors")
    model = load_transformer(tmp_path / "x.safetensors")
    assert all(p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert not model.position_table.requires_grad


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells which memory is a file's")
def test_what_is_stored_as_it_is_used_stays_in_the_mapped_file(tmp_path):
    def copied(model):
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
        spans = [[int(end, 16) for end in addresses.split("-")] for addresses, *_ in maps]
        return {name for name, tensor in model.state_dict().items()
                if not any(start <= tensor.data_ptr() < end for start, end in spans)}

    path = tmp_path / "x.safetensors"
    save_transformer(MMDiT(SD3).bfloat16(), path)
    model = load_transformer(path)
    assert copied(model) == {"image_out.weight", "image_out.bias"}  # whose rows the file has in another order
    model = load_transformer(path, dtype=torch.float32)
    assert copied(model) == model.state_dict().keys()
    save_transformer(MMDiT(SD3), tmp_path / "hub", "hub")
    path = tmp_path / "hub" / "diffusion_pytorch_model.safetensors"
    fused = {f"dual_blocks.{i}.attention.{stream}.qkv.{ending}" for i in range(3) for stream in ("image", "context")
             for ending in ("weight", "bias")}
    model = load_transformer(tmp_path / "hub")
    swapped = {f"{name}.{ending}" for name in ("final_modulation", "dual_blocks.2.context.modulation", "image_out")
               for ending in ("weight", "bias")}
    assert copied(model) == fused | swapped


def test_a_model_may_change_and_be_saved_over_the_file_it_came_from(tmp_path):
    path = tmp_path / "x.safetensors"
    save_transformer(MMDiT(FLUX), path)
    before, model = path.read_bytes(), load_transformer(path, FLUX)
    randomize(model)
    assert path.read_bytes() == before
    save_transformer(model, path)
    assert path.read_bytes() != before
    same_tensors(load_transformer(path, FLUX).state_dict(), model.state_dict())


# ---- what files may have more, less or otherwise


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("names", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"], []])
def test_t5_embedding_under_either_name_or_both(tmp_path, names):
    path, model = tmp_path / "t5.safetensors", T5Encoder(T5)
    save_text_encoder(model, path)
    tensors = load_file(path)
    embedding = tensors.pop("shared.weight")
    save_file(tensors | {f"{name}.weight": embedding.clone() for name in names}, path)
    if names:
        same_tensors(load_text_encoder(path).state_dict(), model.state_dict())
    else:
        with pytest.raises(CheckpointError, match=r"t5\.safetensors: tensor shared\.weight is missing, .*: download"):
            load_text_encoder(path)


def test_clip_with_old_position_ids(tmp_path):
    path, model = tmp_path / "clip_l.safetensors", randomize(ClipTextEncoder(CLIP))
    save_text_encoder(model, path)
    edit(path, lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(20)}))
    same_tensors(load_text_encoder(path, CLIP).state_dict(), model.state_dict())


def test_a_clip_that_lost_its_projection_is_refused(tmp_path):
    model = ClipTextEncoder(replace(CLIP, projection_dim=32))
    save_text_encoder(model, tmp_path / "hub", "hub")
    edit(tmp_path / "hub" / "model.safetensors", lambda tensors: tensors.pop("text_projection.weight"))
    with pytest.raises(CheckpointError, match="hub: the tensors hold no projection, which a CLIPTextModelWithProj"):
        load_text_encoder(tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"hub .* lacks 1 of .* text_projection\.weight of shape \(32, 32\)"):
        load_text_encoder(tmp_path / "hub", model.config)


def test_clip_sizes_that_an_original_file_does_not_hold(tmp_path):
    for width, activation in [(768, "quick_gelu"), (128, "gelu")]:
        config = ClipConfig(vocab_size=9, hidden_size=width, intermediate_size=8, num_layers=1, num_heads=width // 64,
                            activation=activation, max_positions=4, end_token=8)
        save_text_encoder(ClipTextEncoder(config), tmp_path / "clip.safetensors")
        assert load_text_encoder(tmp_path / "clip.safetensors").config == config


def test_original_names_without_prefix_are_read_too(tmp_path):
    model = MMDiT(SD3)
    save_transformer(model, tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    save_file({n.removeprefix("model.diffusion_model."): t for n, t in tensors.items()}, tmp_path / "x.safetensors")
    same_tensors(load_transformer(tmp_path / "x.safetensors").state_dict(), model.state_dict())


def test_hub_folders_without_config_json_tell_their_sizes(tmp_path):
    for config in (SD3, replace(FLUX, hidden_size=256, rope_axes=(16, 56, 56))):
        save_transformer(MMDiT(config), tmp_path / "transformer", "hub")
        (tmp_path / "transformer" / "config.json").unlink()
        assert load_transformer(tmp_path).config == config


# ---- misuse


@pytest.fixture
def stored(tmp_path):
    save_transformer(MMDiT(SD3), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_missing_unknown_and_misshapen_tensors_are_named(stored):
    name, whole = "model.diffusion_model.joint_blocks.1.context_block.mlp.fc1.bias", load_file(stored)
    save_file({n: t for n, t in whole.items() if n != name}, stored)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors .* lacks 1 of .* first {name} of shape \(512,\)"):
        load_transformer(stored)
    query = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"  # by which blocks are counted, too
    save_file({n: t for n, t in whole.items() if n != query}, stored)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of .* first {query}"):
        load_transformer(stored)
    save_file(whole | {name: torch.ones(7)}, stored)
    with pytest.raises(CheckpointError, match=rf"safetensors: tensor {name} is F32 of shape \(7,\), expected \(512,\)"):
        load_transformer(stored)
    save_file(whole | {"model.diffusion_model.x.up": torch.ones(7)}, stored)
    with pytest.raises(CheckpointError, match=r"has 1 tensors .* first model\.diffusion_model\.x\.up: is it a variant"):
        load_transformer(stored)


@pytest.mark.parametrize("name", [
    "x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "joint_blocks.0.x_block.attn.ln_q.weight",
    "joint_blocks.0.x_block.mlp.fc1.weight",
])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (999,), (0, 0), (5, 7), (2, 2, 2, 2)])
def test_nonsense_shapes_never_escape_as_other_errors(stored, name, shape):
    edit(stored, lambda tensors: tensors.update({f"model.diffusion_model.{name}": torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_transformer(stored)


@pytest.mark.parametrize(("change", "message"), [
    ({"num_dual_blocks": 2}, r"joint_blocks\.1\.context_block.* of shape \(768,\), expected \(256,\)"),
    ({"num_dual_blocks": 4}, r"lacks 24 of .* first model\.diffusion_model\.joint_blocks\.2\.context_block"),
    ({"hidden_size": 64}, r"context_embedder\.bias is F32 of shape \(128,\), expected \(64,\) .*: give the config or"),
    ({"num_heads": 4}, r"context_block\.attn\.ln_k\.weight is F32 of shape \(64,\), expected \(32,\)"),
    ({"position_table_size": 192}, r"pos_embed is F32 of shape \(1, 144, 128\), expected \(1, 36864, 128\)"),
    ({"dual_attention_blocks": (0,)}, r"lacks 6 of .* first .*joint_blocks\.0\.x_block\.attn2\.qkv\.weight"),
    ({"mlp_ratio": 2.0}, r"fc1\.bias is F32 of shape \(512,\), expected \(256,\)"),
])
def test_a_config_that_contradicts_the_tensors_is_refused(stored, change, message):
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.* .*{message}"):
        load_transformer(stored, replace(SD3, **change))


@pytest.mark.parametrize("entries", [
    {"num_layers": 2}, {"pos_embed_max_size": 192}, {"dual_attention_layers": [0]}, {"pooled_projection_dim": 7},
    {"caption_projection_dim": 64}, {"qk_norm": None}, {"attention_head_dim": 999, "patch_size": None},
], ids=str)
def test_sizes_are_those_of_the_tensors_whatever_config_json_says(tmp_path, entries):
    save_transformer(MMDiT(SD3), tmp_path / "hub", "hub")
    hub = json.loads((tmp_path / "hub" / "config.json").read_text()) | entries
    (tmp_path / "hub" / "config.json").write_text(json.dumps(hub))
    assert load_transformer(tmp_path / "hub").config == SD3


def test_rotary_axes_cannot_be_guessed():
    with pytest.raises(CheckpointError, match="heads are 32 wide.* give config=MMDiTConfig"):
        load_transformer(DATA / "flux-bfl-guidance.safetensors")


def test_a_loader_refuses_another_s_file(stored, tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds no autoencoder but transformer \(orig"):
        load_autoencoder(stored)
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds no .*t5 but transformer \(original SD3\): give"):
        load_text_encoder(stored)
    save_text_encoder(T5Encoder(T5), tmp_path / "transformer", "hub")
    with pytest.raises(CheckpointError, match=r"transformer holds no transformer but t5 \(T5\): give another"):
        load_transformer(tmp_path)
    with pytest.raises(CheckpointError, match="config is a MMDiTConfig, expected a T5Config"):
        load_text_encoder(tmp_path / "transformer", PRESETS["flux1-dev"])


def test_autoencoders_whose_latents_nobody_describes_need_a_config(tmp_path):
    save_autoencoder(Autoencoder(VAE), tmp_path / "ae.safetensors")
    with pytest.raises(CheckpointError, match="scaling and shift of these latents are not known"):
        load_autoencoder(tmp_path / "ae.safetensors")


@pytest.mark.parametrize(("config", "layout", "message"), [
    (replace(FLUX, mlp_ratio=3.0), "hub", r"x: tensor \S+ is F32 of shape \(192, 64\), expected \(256, 64\)"),
    (replace(FLUX, rope_theta=500), "hub", "x: the hub FLUX.1 layout cannot store rope_theta 500"),
    (replace(FLUX, patch_size=1), "original", "the original FLUX.1 layout cannot store latent_channels 4"),
    (replace(SD3, guidance_embedding=True), "hub", "hub SD3 layout has no place for guidance_in"),
    (replace(SD3, num_single_blocks=1), "original", "original SD3 layout has no place for single_blocks.0"),
    (SD3, "comfy", 'layout "original", or "hub" .*comfy'),
])
def test_models_that_a_layout_cannot_express_are_not_saved(tmp_path, config, layout, message):
    with pytest.raises(CheckpointError, match=message):
        save_transformer(MMDiT(config), tmp_path / ("x.safetensors" if layout == "original" else "x"), layout)
    assert os.listdir(tmp_path) == []
