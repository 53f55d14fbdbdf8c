"""What is no checkpoint of ours, or is a damaged one: one error, by the headers alone, that says what, where, and what
to do."""

import json
import pickle
import time
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as library
from small_models import CLIP, FLUX, SD3, T5, VAE
from sparse import shapes_of, sparse_file

from mmdit import Autoencoder, ClipTextEncoder, MMDiT, T5Encoder
from weights import (
    CheckpointError,
    inspect_checkpoint,
    load,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    save_autoencoder,
    save_text_encoder,
    save_transformer,
)


@pytest.fixture(autouse=True)
def numbers_are_not_read(monkeypatch):
    """Nothing is half built: whatever is wrong is found before the first number is read."""
    monkeypatch.setattr(load, "read_stored", lambda *_: pytest.fail("numbers of a bad file were read"))


# ---- headers


def file_of(path, header, numbers=b"12345678"):
    """A file with this header: JSON, or text that stands for it."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + numbers)
    return path


def entry(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(("header", "reason"), [
    ({"a": entry(0, 4, (1,)), "b": entry(2, 8, (3,), "F16")}, r"damaged \(.*\)"),  # overlaps
    ({"a": entry(), "b": entry()}, r"damaged \(.*\)"),
    ({"a": entry(0, 4, (1,)), "b": entry(6, 8, (1,), "F16")}, r"damaged \(.*\)"),  # a gap
    ({"a.b": entry(4, 8, (1,))}, r"damaged \(.*\)"), ({"a.b": entry(0, 4, (1,))}, r"damaged \(.*\)"),
    ({"a.b": entry(0, 12, (3,))}, r"an interrupted download: \d+ of \d+ bytes, up to tensor a\.b"),
    ({"a.b": entry(0, 8, (3,))}, r"damaged: tensor a\.b has 8 bytes, not those of its shape"),
    ({"a.b": entry(8, 0)}, r"damaged: tensor a\.b has -8 bytes, not those of its shape"),
    ({"a.b": entry(shape=(2**62,))}, r"damaged: tensor a\.b has 8 bytes, not those of its shape"),
    ({"a.b": entry(-8, 0)}, "damaged"), ({"a.b": entry(0, 2**63)}, "damaged"), ({"a.b": entry(0, 8.0)}, "damaged"),
    ({"a.b": entry(False, 8)}, "damaged"), ({"a.b": entry(shape=(-2,))}, "damaged"),
    ({"a.b": entry(shape=("2",))}, "damaged"), ({"a.b": entry(shape=(2**64,))}, "damaged"),
    ({"a.b": entry() | {"shape": None}}, "damaged"), ({"a.b": entry() | {"shape": 2}}, "damaged"),
    ({"a.b": entry() | {"data_offsets": [8]}}, "damaged"), ({"a.b": entry() | {"data_offsets": ""}}, "damaged"),
    ({"a.b": entry(dtype=None)}, "damaged"), ({"a.b": entry(dtype="F99")}, "damaged"),
    ({"a.b": {}}, "damaged"), ({"a.b": None}, "damaged"),
    (b'{"a.b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": NaN}}', "damaged"),
    (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "damaged"),
    ({"a.b": entry(), "__metadata__": {"step": 7}}, "damaged"), ({"a.b": entry(), "__metadata__": []}, "damaged"),
    (b"[]", "damaged"), (b"", "damaged"), (b"\xff\xfe", "damaged"), (b"[" * 100_000, "damaged"),
    (b'{"a.b": 1' + b"0" * 9999 + b"}", "damaged"),
])
def test_what_the_library_refuses_is_refused_with_the_reason(tmp_path, header, reason):
    path = file_of(tmp_path / "x.safetensors", header)
    with pytest.raises(SafetensorError):
        library(path)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {reason}.*: download it again"):
        inspect_checkpoint(path)


@pytest.mark.parametrize("word", ["I8", "I64"])
def test_stored_types_that_are_no_floats_are_named(tmp_path, word):
    path = sparse_file(tmp_path / "x.safetensors", shapes_of("bfl/ae"),
                       lambda name, _: word if name == "decoder.conv_in.weight" else "BF16")
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: tensor decoder\.conv_in\.weight is {word} of .*, ex"):
        load_autoencoder(path)


# ---- other things under the name of a checkpoint


def torch_saved(path, **kwargs):
    torch.save({"a": torch.ones(3)}, path, **kwargs)
    return path.read_bytes()


@pytest.mark.parametrize(("content", "what"), [
    (lambda path: torch_saved(path), "a pickle, which can run any code when opened: use the .safetensors"),
    (lambda path: torch_saved(path, _use_new_zipfile_serialization=False), "a pickle, which can run any code"),
    (lambda path: pickle.dumps({"a": list(range(99))}, protocol=2), "a pickle, which can run any code"),
    (lambda path: b"GGUF" + (3).to_bytes(4, "little") + bytes(99), "a GGUF file, whose quantized weights are not"),
    (lambda path: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    (lambda path: b"<!DOCTYPE html><html>Access denied</html>", "a web page, not a checkpoint.*hf auth login"),
    (lambda path: b"<html>", "a web page, not a checkpoint"),
    (lambda path: b'{"error": "Repository not found"}', "JSON, not a checkpoint: give the .safetensors file"),
])
def test_other_files_under_its_name_are_recognized(tmp_path, content, what):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content(path))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is {what}"):
        inspect_checkpoint(path)


# ---- config.json


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def hub(tmp_path):
    save_transformer(MMDiT(SD3), tmp_path / "transformer", "hub")
    return tmp_path / "transformer"


KINDS = {
    "no norm": (load_transformer, save_transformer, lambda: MMDiT(replace(SD3, qk_norm=False))),
    "flux": (load_transformer, save_transformer, lambda: MMDiT(FLUX)),
    "autoencoder": (load_autoencoder, save_autoencoder, lambda: Autoencoder(VAE)),
    "clip": (load_text_encoder, save_text_encoder, lambda: ClipTextEncoder(CLIP)),
    "t5": (load_text_encoder, save_text_encoder, lambda: T5Encoder(T5)),
}


@pytest.mark.parametrize(("kind", "entries", "message"), [
    ("no norm", {"num_attention_heads": "2"}, "num_attention_heads '2': download it again"),
    ("no norm", {"num_attention_heads": 0}, "num_attention_heads 0: download"),
    ("no norm", {"num_attention_heads": None}, "num_attention_heads None: download"),
    ("no norm", {"num_attention_heads": 10**30}, "num_attention_heads 10+: download"),
    ("no norm", {"num_attention_heads": True}, "num_attention_heads True: download"),
    ("no norm", {"num_attention_heads": 3}, "hidden_size 128 is no multiple of 3 heads"),
    ("flux", {"axes_dims_rope": [8, 24]}, r"rope_axes must be three or four even numbers .* got \(8, 24\)"),
    ("flux", {"axes_dims_rope": "8"}, "axes_dims_rope '8': download"),
    ("flux", {"axes_dims_rope": ["8", 12, 12]}, "rope_axes|axes_dims_rope|unsupported operand"),
    ("flux", {"axes_dims_rope": None}, r"rope_axes must .* width 32, got \(16, 56, 56\)"),
    ("flux", {"_class_name": ["Flux"]}, r"describes a \['Flux'\], expected FluxTransformer2DModel"),
    ("autoencoder", {"scaling_factor": 0}, "scaling_factor 0: download"),
    ("autoencoder", {"scaling_factor": float("nan")}, "scaling_factor nan: download"),
    ("autoencoder", {"shift_factor": "0.1"}, "shift_factor '0.1': download"),
    ("autoencoder", {"norm_num_groups": 0}, "norm_num_groups 0: download"),
    ("autoencoder", {"norm_num_groups": -4}, "norm_num_groups -4: download"),
    ("autoencoder", {"norm_num_groups": 3}, "norm_groups 3"),
    ("clip", {"num_attention_heads": 0}, "num_attention_heads 0: download"),
    ("clip", {"eos_token_id": 60}, "(eos|end)_token.* 60"),
    ("clip", {"eos_token_id": "59"}, "eos_token_id '59': download"),
    ("clip", {"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\]: download"),
    ("clip", {"hidden_act": "relu"}, "relu"),
    ("clip", {"architectures": {"0": "CLIPTextModel"}}, "describes a .*, expected CLIPTextModel"),
    ("t5", {"relative_attention_max_distance": 10**400}, "relative_attention_max_distance 10+.*: download"),
])
def test_a_config_that_makes_no_sense_names_its_entry(tmp_path, kind, entries, message):
    read, save, module = KINDS[kind]
    save(module(), tmp_path / "hub", "hub")
    edit_json(tmp_path / "hub" / "config.json", lambda config: config.update(entries))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"hub: .*{message}"):
        read(tmp_path / "hub")
    assert time.process_time() - start < 5  # no module of a billion layers is built first


@pytest.mark.parametrize("text", ['{"num_layers": 3', "[3]", "3", "", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json(hub, text):
    (hub / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON object \(.*\): download it again"):
        load_transformer(hub)
