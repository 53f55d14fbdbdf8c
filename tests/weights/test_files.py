"""Damaged, dangerous and missing files, and writing all or nothing."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weights import CheckpointError
from weights.files import read_tensor
from weights.locate import open_checkpoint
from weights.writing import write_file, write_folder

CONFIG = {"hidden": 4}


@pytest.fixture
def tensors():
    """Of odd sizes and several widths, so that a wrong offset shows."""
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, dtype=torch.bfloat16), "a": torch.randn(2, 3), "h": torch.randn(5).half(),
        "d": torch.randn((), dtype=torch.float64), "t": torch.randn(4, 3).T,
    }


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_written_files_are_read_by_the_library(tmp_path, tensors):
    write_file(tmp_path / "new" / "x.safetensors", tensors)
    same(load_file(tmp_path / "new" / "x.safetensors"), tensors)
    with safe_open(tmp_path / "new" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_the_library_s_files_are_read(tmp_path, tensors):
    tensors["t"] = tensors["t"].contiguous()
    save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    same({name: read_tensor(entry) for name, entry in checkpoint.entries.items()}, tensors)
    assert read_tensor(checkpoint.entries["a"], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("limit", "files"), [(None, 1), (1000, 1), (48, 2), (24, 4), (1, 5)])
def test_shards_hold_every_tensor_once_and_respect_the_limit(tmp_path, tensors, limit, files):
    write_folder(tmp_path / "hub", tensors, CONFIG, "model", limit)
    shards = sorted((tmp_path / "hub").glob("*.safetensors"))
    contents = [load_file(shard) for shard in shards]
    assert len(shards) == files
    assert sum(len(c) for c in contents) == len(tensors)
    same({name: tensor for c in contents for name, tensor in c.items()}, tensors)
    if limit:
        assert all(len(c) == 1 or sum(t.nbytes for t in c.values()) <= limit for c in contents)
    checkpoint = open_checkpoint(tmp_path / "hub")
    same({name: read_tensor(entry) for name, entry in checkpoint.entries.items()}, tensors)
    assert checkpoint.config == CONFIG
    if files > 1:
        index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(("content", "reason"), [
    (lambda whole: b"", "has 0 bytes"),
    (lambda whole: whole[:5], "has 5 bytes"),
    (lambda whole: whole[:50], "header would be .* bytes long, the file has 50"),
    (lambda whole: whole[:-1], r"tensor \w ends at byte"),
    (lambda whole: whole + b"x", "1 bytes belong to no tensor"),
    (lambda whole: (9).to_bytes(8, "little") + b"not json!", "header is no JSON"),
], ids=["empty", "five bytes", "half a header", "byte short", "byte long", "no json"])
def test_damaged_files_are_refused(tmp_path, tensors, content, reason):
    file = tmp_path / "x.safetensors"
    write_file(file, tensors)
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors is truncated or no safetensors file \(.*{reason}"):
        open_checkpoint(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"whatever")
    for path in (tmp_path / f"model{suffix}", tmp_path):  # named, or all that its folder has
        with pytest.raises(CheckpointError, match=f"model{suffix} is a pickle, which can run any code"):
            open_checkpoint(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        open_checkpoint(tmp_path / "nowhere.safetensors")
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file.*folders here: text_encoder_2"):
        open_checkpoint(tmp_path)


def test_a_folder_of_many_files_is_not_guessed_at(tmp_path, tensors):
    for name in ("flux1-dev", "ae"):
        write_file(tmp_path / f"{name}.safetensors", tensors)
    with pytest.raises(CheckpointError, match="holds 2 checkpoints: give one"):
        open_checkpoint(tmp_path)


def test_plain_names_come_before_variants(tmp_path, tensors):
    write_file(tmp_path / "model.fp16.safetensors", {"half": tensors["h"]})
    assert list(open_checkpoint(tmp_path).entries) == ["half"]
    write_file(tmp_path / "model.safetensors", {"full": tensors["a"]})
    assert list(open_checkpoint(tmp_path).entries) == ["full"]


def test_stored_types_that_are_no_floats_are_refused(tmp_path):
    save_file({"w": torch.zeros(2, dtype=torch.int32)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="tensor w is stored as I32, expected one of F64, F32, F16, BF16"):
        read_tensor(checkpoint.entries["w"])
    with pytest.raises(CheckpointError, match="tensor w is torch.int64"):
        write_file(tmp_path / "y.safetensors", {"w": torch.zeros(2, dtype=torch.int64)})
    assert os.listdir(tmp_path) == ["x.safetensors"]


def edit_index(folder, change):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "..", "a\\b.safetensors", ""])
def test_an_index_cannot_point_outside_its_folder(tmp_path, tensors, shard):
    write_file(tmp_path / "secret.safetensors", {"a": tensors["a"]})
    write_folder(tmp_path / "hub", tensors, CONFIG, "model", 1)
    edit_index(tmp_path / "hub", lambda weight_map: weight_map.update(a=shard))
    with pytest.raises(CheckpointError, match="outside its own folder"):
        open_checkpoint(tmp_path / "hub")


def test_shards_and_index_must_agree(tmp_path, tensors):
    hub = tmp_path / "hub"
    write_folder(hub, tensors, CONFIG, "model", 1)
    edit_index(hub, lambda weight_map: weight_map.update(ghost=weight_map["a"]))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005\.safetensors lacks tensor ghost"):
        open_checkpoint(hub)
    (hub / "model-00003-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00005\.safetensors is missing"):
        open_checkpoint(hub)
    (hub / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json is no JSON object \(it is a list\)"):
        open_checkpoint(hub)
    (hub / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match='no "weight_map"'):
        open_checkpoint(hub)
    (hub / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is no JSON"):
        open_checkpoint(hub)


def disk_full(*_):
    raise OSError(28, "No space left on device")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("hub", [False, True])
def test_a_failed_write_leaves_everything_as_it_was(tmp_path, tensors, monkeypatch, failing, existing, hub):
    def write(content):
        if hub:
            write_folder(tmp_path / "hub", content, CONFIG, "model", 1)
        else:
            write_file(tmp_path / "x.safetensors", content)

    if existing:
        write({"old": torch.ones(2)})
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, failing, disk_full)
        write(tensors)
    assert snapshot(tmp_path) == before
    assert len(os.listdir(tmp_path)) == int(existing)  # no scratch folder either


def test_a_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, tensors, monkeypatch):
    write_folder(tmp_path / "hub", {"old": torch.ones(2)}, CONFIG, "model")
    before, replace = snapshot(tmp_path), os.replace

    def replace_but_the_new(source, target):
        if source.name == "new":
            disk_full()
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", replace_but_the_new)
        write_folder(tmp_path / "hub", tensors, CONFIG, "model")
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["hub"]


def test_a_checkpoint_is_replaced_as_a_whole_and_nothing_else_ever(tmp_path, tensors):
    hub = tmp_path / "hub"
    write_folder(hub, tensors, CONFIG, "model", 1)
    write_folder(hub, tensors, CONFIG, "model")
    assert sorted(os.listdir(hub)) == ["config.json", "model.safetensors"]  # no shard of the first is left
    (hub / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds more than a checkpoint \(thesis\.txt\)"):
        write_folder(hub, tensors, CONFIG, "model")
    assert (hub / "thesis.txt").read_text() == "precious"


def test_names_that_fit_no_layout_are_refused(tmp_path, tensors):
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.safetensors").mkdir()
    for path in (tmp_path / "file", tmp_path / "x.safetensors"):
        with pytest.raises(CheckpointError, match="the hub layout is a folder"):
            write_folder(path, tensors, CONFIG, "model")
    for path in (tmp_path / "file.txt", tmp_path / "dir.safetensors"):
        with pytest.raises(CheckpointError, match="the original layout is one file"):
            write_file(path, tensors)
    with pytest.raises(CheckpointError, match="max_shard_bytes must be at least 1"):
        write_folder(tmp_path / "hub", tensors, CONFIG, "model", 0)
    assert sorted(os.listdir(tmp_path)) == ["dir.safetensors", "file"]
