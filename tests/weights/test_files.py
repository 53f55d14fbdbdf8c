"""Damaged, dangerous and missing files; writing all or nothing."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FLUX, randomize, same_tensors

import weights.save
from mmdit import MMDiT
from weights import CheckpointError, inspect_checkpoint, load_transformer, save_transformer
from weights.files import find_weights, list_tensors, read_header

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def model():
    return randomize(MMDiT(FLUX)).bfloat16()


@pytest.fixture
def hub(tmp_path, model):
    save_transformer(model, tmp_path / "hub", "hub", 100_000)
    return tmp_path / "hub"


# ---- reading


@pytest.mark.parametrize(("content", "reason"), [
    (lambda whole: b"", "an interrupted download: it has 0 bytes, fewer than its header: download it again"),
    (lambda whole: whole[:5], "an interrupted download: it has 5 bytes, fewer than its header"),
    (lambda whole: whole[:50], "an interrupted download: it has 50 bytes, fewer than its header"),
    (lambda whole: whole[:-1], r"an interrupted download: [\d,]+ of [\d,]+ bytes, up to tensor "),
    (lambda whole: whole + b"x", "damaged .*: download it again"),
    (lambda whole: (9).to_bytes(8, "little") + b"not json!", "damaged .*: download it again"),
    (lambda whole: (0x280).to_bytes(8, "little") + b'{"a": ', "an interrupted download"),  # a pickle begins like that
], ids=["empty", "five bytes", "half a header", "byte short", "byte long", "no json", "no pickle"])
def test_damaged_files_are_refused(tmp_path, model, content, reason):
    file = tmp_path / "x.safetensors"
    save_transformer(model, file)
    file.write_bytes(content(file.read_bytes()))
    for read in (read_header, load_transformer, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=rf"x\.safetensors is {reason}"):
            read(file)


def test_of_a_cut_file_the_first_cut_tensor_is_named(tmp_path, model):
    file = tmp_path / "x.safetensors"
    save_transformer(model, file)
    content, header = file.read_bytes(), read_header(file)
    start = 8 + int.from_bytes(content[:8], "little")
    at = {name: json.loads(content[8:start])[name]["data_offsets"] for name in header}
    for name, (_, end) in at.items():
        file.write_bytes(content[: start + end - 1])
        with pytest.raises(CheckpointError, match=f"up to tensor {name}: download it again"):
            read_header(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    file = tmp_path / f"{'model' if suffix == '.bin' else 'flux1-dev'}{suffix}"
    torch.save({"a": torch.ones(3)}, file)
    for path in (file, tmp_path):  # named, or all that its folder has
        with pytest.raises(CheckpointError, match=f"{file.name} is a pickle, which can run any code .*: use the"):
            load_transformer(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist: give a \.safetensors file"):
        load_transformer(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file: give another path"):
        load_transformer(tmp_path)


def test_plain_names_come_before_variants(tmp_path):
    names = ["model.fp16.safetensors", "model.safetensors.index.fp16.json",
             "diffusion_pytorch_model.safetensors.index.json", "model.safetensors"]
    for name in names:
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name


def edit_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "..", "a\\b.safetensors", "",
                                   "config.json", "a\0.safetensors"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, hub, shard):
    save_file({"x_embedder.bias": torch.ones(64)}, tmp_path / "secret.safetensors")
    edit_index(hub, lambda weight_map: weight_map.update({"x_embedder.bias": shard}))
    with pytest.raises(CheckpointError, match=rf"{INDEX} points to .*, no weights in its own folder: do not trust it"):
        load_transformer(hub)


def test_shards_and_index_must_agree(hub):
    first, second = sorted(hub.glob("*.safetensors"))[:2]
    moved = next(iter(load_file(first)))
    for change, name in [
        (lambda weight_map: weight_map.update(ghost=first.name), "ghost"),
        (lambda weight_map: weight_map.pop("ghost") and weight_map.pop(moved), moved),
        (lambda weight_map: weight_map.update({moved: second.name}), moved),
    ]:
        edit_index(hub, change)
        with pytest.raises(CheckpointError, match=f"{INDEX} and its shards disagree on tensor {name}: downl"):
            load_transformer(hub)
    edit_index(hub, lambda weight_map: weight_map.update({moved: "x" * 300 + ".safetensors"}))
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is missing: an interrupted download"):
        load_transformer(hub)


@pytest.mark.parametrize(("text", "message"), [
    ("[]", r"index\.json is no JSON object \(.*\): download it again"), ("{", r"index\.json is no JSON object \("),
    ("{}", r'index\.json has no "weight_map" from tensor names to files: download'),
    ('{"weight_map": {"x": 7}}', 'has no "weight_map"'), ('{"weight_map": [["x", "y"]]}', 'has no "weight_map"'),
    ('{"weight_map": {}}',
     r"index\.json is no part of FLUX\.1, FLUX\.2 or SD3 .*its first tensor: none at all\): give an"),
])
def test_an_index_that_is_none(hub, text, message):
    (hub / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(hub)


def test_a_missing_shard_is_named_and_a_lone_one_says_so(hub):
    first, second = sorted(hub.glob("*.safetensors"))[:2]
    with pytest.raises(CheckpointError, match=rf"{first.name} is one of \d+ shards: give the folder of all and the"):
        load_transformer(first)
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{second.name} is an interrupted download: .* up to tensor "):
        load_transformer(hub)
    second.unlink()
    for path in (hub, hub.parent / "transformer"):
        hub = hub.rename(path)
    for path in (hub, hub.parent):
        with pytest.raises(FileNotFoundError, match=rf"{second.name} is missing: an interrupted download"):
            load_transformer(path)


# ---- writing


@pytest.mark.parametrize("limit", [None, 10**9, 100_000, 20_000, 1])
def test_shards_hold_every_tensor_once_and_respect_the_limit(tmp_path, model, limit):
    save_transformer(model, tmp_path / "hub", "hub", limit)
    shards = sorted((tmp_path / "hub").glob("*.safetensors"))
    contents = [load_file(shard) for shard in shards]
    whole = {name: tensor for content in contents for name, tensor in content.items()}
    assert sum(len(content) for content in contents) == len(whole) == len(list_tensors(find_weights(tmp_path / "hub")))
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in contents]
    assert (len(shards) == 1) == (limit in (None, 10**9)) and (limit != 1 or len(shards) == len(whole))
    assert all(size <= limit or len(content) == 1 for size, content in zip(sizes, contents, strict=True) if limit)
    if len(shards) > 1:
        index = json.loads((tmp_path / "hub" / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
    same_tensors(load_transformer(tmp_path / "hub").state_dict(), model.state_dict())


def disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("failing", ["write", "replace"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("layout", ["original", "hub"])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, model, monkeypatch, failing, existing, layout):
    path = tmp_path / ("hub" if layout == "hub" else "x.safetensors")
    if existing:
        save_transformer(MMDiT(FLUX), path, layout)
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        for module, name in ((weights.save, "save_file"), (weights.save, "save_torch_state_dict"), (os, "replace")):
            if (module is os) == (failing == "replace"):
                patch.setattr(module, name, disk_full)
        save_transformer(model, path, layout)
    assert contents(tmp_path) == before
    assert len(os.listdir(tmp_path)) == int(existing)  # no scratch folder either


def test_a_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, hub, model, monkeypatch):
    before, replace = contents(tmp_path), os.replace

    def replace_but_the_new(source, target):
        if source.name == "new":
            disk_full()
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", replace_but_the_new)
        save_transformer(model, hub, "hub")
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["hub"]


def test_a_checkpoint_is_replaced_as_a_whole_and_nothing_else_ever(hub, model):
    save_transformer(model, hub, "hub")
    assert sorted(os.listdir(hub)) == ["config.json", "diffusion_pytorch_model.safetensors"]  # no old shard is left
    (hub / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"hub holds more than a checkpoint \(thesis\.txt\) and would be"):
        save_transformer(model, hub, "hub")
    assert (hub / "thesis.txt").read_text() == "precious"


def test_names_that_fit_no_layout_are_refused(tmp_path, model):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.safetensors").mkdir()
    for name, layout, *limit in [("file", "hub"), ("x.safetensors", "hub"), ("file.txt", "original"),
                                 ("dir.safetensors", "original"), ("hub", "hub", 0), ("x.safetensors", "original", 9)]:
        message = f"shards from 1 byte, got .*, {limit[0]}" if limit else f"{name}: give a folder for the hub"
        with pytest.raises(CheckpointError, match=message):
            save_transformer(model, tmp_path / name, layout, *limit)
    assert sorted(os.listdir(tmp_path)) == ["dir.safetensors", "file"]
