"""Which networks names, prefixes and widths tell, in the public files and in others'."""

import re
from pathlib import Path

import pytest
from small_models import CLIP, same_tensors
from sparse import MANIFESTS, shapes_of, sparse_file

from mmdit import ClipTextEncoder
from weights import CheckpointError, load_autoencoder, load_text_encoder, load_transformer, save_text_encoder
from weights.detect import recognize
from weights.files import TensorEntry

# what the autoencoder's statistics and the text decoders have beside the network
NEVER_READ = re.compile(r"num_batches_tracked|^(language_model\.)?lm_head\.|^vision_tower\.|^multi_modal_projector\.")


def parts_of(tensors):
    return recognize({name: TensorEntry(Path("file"), name, "F32", shape) for name, shape in tensors.items()},
                     Path("file"))


def roles(tensors):
    return [part.role for part in parts_of(tensors)]


def test_every_tensor_of_a_public_file_belongs_to_the_network_it_is_of():
    for manifest in MANIFESTS:
        parts = parts_of(shapes_of(manifest))
        assert len(parts) == (2 if manifest.startswith("sai") else 1), manifest
        named = [entry.name for part in parts for entry in part.entries.values()]
        passed = {"encoder.embed_tokens.weight"} if "t5" in manifest else set()  # shared.weight under another name
        passed |= {name for name in shapes_of(manifest) if NEVER_READ.search(name)}
        assert sorted({*named} | passed) == sorted(shapes_of(manifest)) and len(named) == len(set(named))
        assert not any(part.unused for part in parts)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_merged_files_are_parted_and_strange_names_belong_to_the_network_without_prefix(prefix):
    networks = {prefix: "bfl/flux1-dev", "vae.": "bfl/ae", "text_encoders.clip_l.transformer.": "text/clip_l"}
    merged = {name: shape for start, manifest in networks.items() for name, shape in shapes_of(manifest, start).items()}
    parts = parts_of(merged | {"strange.weight": (1,)})
    assert {part.prefix: part.role for part in parts} == dict(zip(networks, ["transformer", "autoencoder", "clip_l"],
                                                                  strict=True))
    for part in parts:
        strange = {"strange.weight"} if part.prefix == "" else set()
        assert part.entries.keys() == shapes_of(networks[part.prefix]).keys() | strange
        assert part.unused == (("strange.weight",) if prefix else ())


def test_prefix_goes_before_width_and_width_tells_the_clips():
    assert roles(shapes_of("text/clip_l")) == roles(shapes_of("text/clip_l.projection")) == ["clip_l"]
    assert roles(shapes_of("text/clip_g")) == ["clip_g"]
    bare = {name.removeprefix("text_model."): shape for name, shape in shapes_of("text/clip_l").items()}
    assert roles(bare) == ["clip_l"]  # as transformers 5 writes it
    assert roles(shapes_of("text/clip_g", "text_encoders.clip_l.transformer.")) == ["clip_l"]
    narrow = shapes_of("text/clip_l") | {"text_model.embeddings.token_embedding.weight": (49408, 512)}
    assert roles(narrow) == ["clip"]


def test_the_same_rule_serves_loading(tmp_path):
    clip_g = sparse_file(tmp_path / "any.safetensors", shapes_of("text/clip_g"))
    with pytest.raises(CheckpointError, match=r"any\.safetensors holds no clip_l but clip_g \(CLIP\): give another"):
        load_text_encoder(clip_g, which="clip_l")
    save_text_encoder(ClipTextEncoder(CLIP), tmp_path / "narrow.safetensors")
    for which in ("clip_l", "clip_g"):  # of a width that tells nothing: whoever asks knows
        same_tensors(load_text_encoder(tmp_path / "narrow.safetensors", CLIP, which=which).state_dict(),
                     load_text_encoder(tmp_path / "narrow.safetensors", CLIP).state_dict())


UNET = "down_blocks.0.resnets.0.conv1.weight"


@pytest.mark.parametrize(("names", "what"), [
    ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", "a LoRA"),  # diffusers
    ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "a LoRA"),  # kohya
    ("double_blocks.0.processor.proj_lora1.down.weight", "a LoRA"),  # XLabs
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale", "a LoRA"),
    ("lycoris_blocks_0.hada_w1_a", "a LoRA"),
    ("controlnet_blocks.0.weight", "a ControlNet"), ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
    ("control_model.input_blocks.0.0.weight", "a ControlNet"), ("input_hint_block.0.weight", "a ControlNet"),
    ("double_blocks.0.img_attn.proj.weight.absmax", "quantized to 4 or 8 bits"),
    ("model.diffusion_model.double_blocks.0.img_attn.proj.weight.quant_state.bitsandbytes__nf4", "quantized to 4"),
    ("transformer_blocks.0.qkv_proj.qweight", "quantized to 4 or 8 bits"),
    ("distilled_guidance_layer.in_proj.weight", "Chroma"),
    ("model.diffusion_model.label_emb.0.0.weight", "SDXL"), ("add_embedding.linear_1.weight", "SDXL"),
    ("conditioner.embedders.1.model.ln_final.weight", "SDXL"),
    ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion 1 or 2"), (UNET, "Stable Diffusion 1 or 2"),
    # the more telling name counts
    (f"{UNET} add_embedding.linear_1.weight", "SDXL"), (f"{UNET} controlnet_mid_block.weight", "a ControlNet"),
])
@pytest.mark.parametrize("load", [load_transformer, load_autoencoder, load_text_encoder])
def test_names_of_other_models(tmp_path, load, names, what):
    """Refused whatever is looked for, though parts of the file have names that are known."""
    known = ["first_stage_model.encoder.down.0.block.0.conv1.weight", "another.weight",
             "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"]
    file = sparse_file(tmp_path / "x.safetensors", dict.fromkeys([*known, *names.split()], (2, 2)))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {what}.*: give another file"):
        load(file)
