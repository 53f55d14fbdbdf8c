"""What is no checkpoint of ours, or is a damaged one: one error, by the headers alone, that says what, where, and what
to do."""

import json
import pickle
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, FLUX, SD3, T5, VAE

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import (
    CheckpointError,
    fill,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    open_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)
from weights.locate import open_checkpoint


@pytest.fixture(autouse=True)
def numbers_are_not_read(monkeypatch):
    """Nothing is half built: whatever is wrong is found before the first number is read."""
    monkeypatch.setattr(fill, "fill", lambda *_: pytest.fail("numbers of a bad file were read"))


# ---- headers


def file_of(path, header, numbers=b"12345678"):
    """A file with this header: JSON, or text that stands for it."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + numbers)
    return path


def entry(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def twice(name, text):
    return f'{{"{name}": {text}, "{name}": {text}}}'.encode()


NOT_ONE_OF = r"the header's entry for tensor a\.b is not one of dtype, shape and data_offsets"


@pytest.mark.parametrize(("header", "reason"), [
    ({"a": entry(0, 4, (1,)), "b": entry(2, 8, (3,), "F16")}, r"b overlaps the tensor before it: it starts at byte 1"),
    ({"a": entry(), "b": entry()}, "b overlaps the tensor before it"),
    ({"a": entry(0, 4, (1,)), "b": entry(6, 8, (1,), "F16")}, "b leaves a gap before it"),
    ({"a.b": entry(4, 8, (1,))}, r"a\.b leaves a gap before it"),
    ({"a.b": entry(0, 4, (1,))}, "4 bytes belong to no tensor"),
    ({"a.b": entry(0, 12, (3,))}, r"a\.b ends at byte \d+, the file at \d+"),
    ({"a.b": entry(0, 8, (3,))}, r"a\.b has 8 bytes, but shape \(3,\) of F32 needs 12"),
    ({"a.b": entry(8, 0)}, r"a\.b has -8 bytes"),
    ({"a.b": entry(shape=(2**62,))}, r"a\.b has 8 bytes, but shape \(4611686018427387904,\)"),
    ({"a.b": entry(-8, 0)}, NOT_ONE_OF), ({"a.b": entry(0, 2**63)}, NOT_ONE_OF), ({"a.b": entry(0, 8.0)}, NOT_ONE_OF),
    ({"a.b": entry(False, 8)}, NOT_ONE_OF), ({"a.b": entry(shape=(-2,))}, NOT_ONE_OF),
    ({"a.b": entry(shape=("2",))}, NOT_ONE_OF), ({"a.b": entry(shape=(2**64,))}, NOT_ONE_OF),
    ({"a.b": entry() | {"shape": None}}, NOT_ONE_OF), ({"a.b": entry() | {"shape": 2}}, NOT_ONE_OF),
    ({"a.b": entry() | {"data_offsets": [8]}}, NOT_ONE_OF), ({"a.b": entry(dtype=None)}, NOT_ONE_OF),
    ({"a.b": {}}, NOT_ONE_OF), ({"a.b": None}, NOT_ONE_OF), ({"a.b": ["F32", [2], [0, 8]]}, NOT_ONE_OF),
    (twice("a.b", json.dumps(entry())), r"a\.b occurs in it twice"),
    (b'{"a.b": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "shape occurs in it twice"),
    (b'{"a.b": {"dtype": "F32", "shape": [2], "data_offsets": [-0, 8]}}', NOT_ONE_OF),
    (b'{"a.b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": NaN}}', "NaN is no number"),
    (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "surrogates not allowed"),
    ({"a.b": entry(), "__metadata__": {"step": 7}}, "__metadata__ does not map names to strings"),
    ({"a.b": entry(), "__metadata__": []}, "__metadata__ does not map names to strings"),
    ([], "it is a list"), (b"", "no JSON object"), (b"\xff\xfe", "can't decode byte"), (b"[" * 100_000, "too deeply"),
    (b'{"a.b": 1' + b"0" * 9999 + b"}", "no JSON object"),
])
def test_a_damaged_header_is_refused_with_the_reason(tmp_path, header, reason):
    if header in ({"__metadata__": []}, []):
        header = json.dumps(header).encode()
    path = file_of(tmp_path / "x.safetensors", header)
    message = rf"x\.safetensors is truncated or no safetensors file \((.*{reason}.*)\): download it again"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_stored_types_that_nobody_knows_are_named(tmp_path):
    path = file_of(tmp_path / "x.safetensors", {"a.b": entry(dtype="F4")})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor a\.b is stored as F4, expected one of F64, F32"):
        open_checkpoint(path)


# ---- other things under the name of a checkpoint


def torch_saved(path, **kwargs):
    torch.save({"a": torch.ones(3)}, path, **kwargs)
    return path.read_bytes()


@pytest.mark.parametrize(("content", "what"), [
    (lambda path: torch_saved(path), "a pickle of PyTorch, which can run any code when opened: use the .safetensors"),
    (lambda path: torch_saved(path, _use_new_zipfile_serialization=False), "a pickle, which can run any code"),
    (lambda path: pickle.dumps({"a": list(range(99))}, protocol=2), "a pickle, which can run any code"),
    (lambda path: b"GGUF" + (3).to_bytes(4, "little") + bytes(99), "a GGUF file, whose quantized weights are not"),
    (lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    (lambda path: b"<!DOCTYPE html><html>Access denied</html>", "a web page, not a checkpoint.*hf auth login"),
    (lambda path: b"<html>", "a web page, not a checkpoint"),
    (lambda path: b'{"error": "Repository not found"}', "JSON, not a checkpoint: give the .safetensors file"),
    (lambda path: b"{}", "JSON, not a checkpoint"),
])
def test_other_files_under_its_name_are_recognized(tmp_path, content, what):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content(path))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {what}"):
        open_checkpoint(path)


def test_a_truncated_file_is_not_taken_for_a_pickle(tmp_path):
    """Its header is 0x280 bytes long, and a pickle begins with the bytes 0x80, 0x02."""
    (tmp_path / "x.safetensors").write_bytes((0x280).to_bytes(8, "little") + b'{"a": ')
    with pytest.raises(CheckpointError, match="truncated .* header would be 640 bytes long, the file has 14"):
        open_checkpoint(tmp_path / "x.safetensors")


BLOCK = "double_blocks.0.img_attn.qkv.weight"
SD15 = ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"]
SDXL = SD15[:2] + ["conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
                   "model.diffusion_model.label_emb.0.0.weight"]


@pytest.mark.parametrize("load", [load_transformer, load_autoencoder, load_text_encoder])
@pytest.mark.parametrize(("names", "what"), [
    (SD15, "Stable Diffusion 1 or 2, whose network is no MMDiT"), (SDXL, "SDXL, whose network is no MMDiT"),
    (["down_blocks.0.resnets.0.conv1.weight"], "Stable Diffusion 1 or 2"),
    (["down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"], "SDXL"),
    (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA"),
    (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
    (["controlnet_x_embedder.weight"], "a ControlNet"),
    (["double_blocks.0.img_attn.proj.weight.absmax"], "quantized to 4 or 8 bits"),
])
def test_other_models_are_recognized(tmp_path, load, names, what):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {what}.*: give"):
        load(tmp_path / "x.safetensors")


# ---- checkpoints of ours with something wrong


@pytest.fixture
def hub(tmp_path):
    save_transformer(MMDiT(SD3), tmp_path / "transformer", "hub", max_shard_bytes=300_000)
    return tmp_path / "transformer"


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_missing_shard_is_named_and_a_lone_one_says_so(hub, tmp_path):
    shards = sorted(hub.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="tensor .* is missing: give the whole file, or the folder of all"):
        load_transformer(shards[0], SD3)
    shards[1].unlink()
    for path in (hub, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{shards[1].name} is missing, which .*index.json names: down"):
            load_transformer(path)


def test_damage_in_one_shard_is_found_there(hub):
    shard = sorted(hub.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated .*tensor .* ends at byte"):
        load_transformer(hub)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda names: names.update(dict.fromkeys(names, "x" * 300)), FileNotFoundError, "xxx is missing, which"),
    (lambda names: names.update(dict.fromkeys(names, 7)), CheckpointError, 'has no "weight_map" from tensor names'),
    (lambda names: names.update(dict.fromkeys(names, "config.json")), CheckpointError, "config.json is JSON, not a"),
    (lambda names: names.clear(), CheckpointError, "unknown layout; .* found no tensor at all"),
    (lambda names: names.popitem(), CheckpointError, "holds tensor .*, which .*index.json does not list"),
])
def test_an_index_that_is_wrong(hub, change, error, message):
    edit_json(hub / "diffusion_pytorch_model.safetensors.index.json", lambda content: change(content["weight_map"]))
    with pytest.raises(error, match=message):
        load_transformer(hub)


def test_integers_for_weights_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_transformer(MMDiT(FLUX), path)
    tensors = load_file(path)
    save_file(tensors | {BLOCK: tensors[BLOCK].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: tensor {BLOCK} is stored as I8, expected one of F64"):
        load_transformer(path, FLUX)


def test_a_file_that_shrinks_once_it_is_recognized(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "x.safetensors"
    save_transformer(MMDiT(FLUX), path)
    stored = open_transformer(path, FLUX)
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(CheckpointError, match=r"x\.safetensors has become shorter since it was opened: load it again"):
        stored.load()


# ---- config.json

KINDS = {
    "sd3": (load_transformer, save_transformer, lambda: MMDiT(SD3)),
    "flux": (load_transformer, save_transformer, lambda: MMDiT(FLUX)),
    "autoencoder": (load_autoencoder, save_autoencoder, lambda: Autoencoder(VAE)),
    "clip": (load_text_encoder, save_text_encoder, lambda: ClipTextEncoder(CLIP)),
    "t5": (load_text_encoder, save_text_encoder, lambda: T5Encoder(T5)),
}


@pytest.mark.parametrize(("kind", "entries", "message"), [
    ("sd3", {"num_layers": 10**9}, "config says num_dual_blocks 1000000000, the tensors say 3"),
    ("sd3", {"num_layers": 10**30}, r"num_layers 10{30}, expected a whole number from 1 to 2³¹"),
    ("sd3", {"num_attention_heads": "2"}, "num_attention_heads '2', expected a whole number"),
    ("sd3", {"num_attention_heads": 0}, "num_attention_heads 0, expected a whole number"),
    ("sd3", {"attention_head_dim": [64]}, r"attention_head_dim \[64\], expected a whole number"),
    ("sd3", {"patch_size": None}, "patch_size None, expected a whole number"),
    ("sd3", {"dual_attention_layers": {"0": 1}}, "dual_attention_layers .* expected a list of whole numbers"),
    ("sd3", {"pos_embed_max_size": 13.0}, "pos_embed_max_size 13.0, expected a whole number"),
    ("flux", {"in_channels": 17}, "in_channels 17, expected 16"),
    ("flux", {"axes_dims_rope": [8, 24]}, r"rope_axes must be three even numbers .* got \(8, 24\)"),
    ("flux", {"axes_dims_rope": "8"}, "axes_dims_rope '8', expected a list of whole numbers"),
    ("flux", {"guidance_embeds": "no"}, "guidance_embeds 'no', expected true or false"),
    ("flux", {"_class_name": ["Flux"]}, r"describes a \['Flux'\], expected FluxTransformer2DModel"),
    ("autoencoder", {"scaling_factor": 0}, "scaling_factor 0, expected a positive number"),
    ("autoencoder", {"shift_factor": "0.1"}, "shift_factor '0.1', expected a number"),
    ("autoencoder", {"norm_num_groups": 0}, "norm_num_groups 0, expected a whole number from 1"),
    ("autoencoder", {"norm_num_groups": -4}, "norm_num_groups -4, expected a whole number from 1"),
    ("autoencoder", {"block_out_channels": 8}, "block_out_channels 8, expected a list of whole numbers"),
    ("clip", {"num_attention_heads": 0}, "num_attention_heads 0, expected a whole number"),
    ("clip", {"eos_token_id": 60}, "eos_token_id 60, expected one below vocab_size 60"),
    ("clip", {"eos_token_id": None}, "eos_token_id None, expected a whole number"),
    ("clip", {"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\], expected a string"),
    ("clip", {"architectures": {"0": "CLIPTextModel"}}, "describes a None, expected CLIPTextModel"),
    ("clip", {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 10**9}, "lacks 1 of .* text_pro"),
    ("t5", {"relative_attention_max_distance": 10**400}, "relative_attention_max_distance 10+.* expected a whole"),
    ("t5", {"num_heads": True}, "num_heads True, expected a whole number"),
])
def test_a_config_that_makes_no_sense_names_its_entry(tmp_path, kind, entries, message):
    load, save, module = KINDS[kind]
    save(module(), tmp_path / "hub", "hub")
    edit_json(tmp_path / "hub" / "config.json", lambda config: config.update(entries))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"hub.* .*{message}"):
        load(tmp_path / "hub")
    assert time.process_time() - start < 5  # no module of a billion layers is built first


def test_a_config_that_is_no_json(hub):
    (hub / "config.json").write_text('{"num_layers": 3, "num_layers": 4}')
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON object \(num_layers occurs in it twice\)"):
        load_transformer(hub)
