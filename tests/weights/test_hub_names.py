"""Names on the hub: found in the cache as huggingface_hub keeps it, else downloaded (here, never over the network)."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from small_models import SD3, same_tensors
from sparse import shapes_of, sparse_file, sparse_hub_folder

import weights
from mmdit import MMDiT
from weights import BUNDLED, load_transformer, save_transformer
from weights.hub import cache_folder, resolve

NAME, HASH = "somebody/some-model.1", "0" * 39 + "1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; whoever downloads without asking fails."""
    def refuse(*_, **__):
        raise AssertionError("a download was started")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "cache"


@pytest.fixture
def without_package(monkeypatch):
    """As if huggingface_hub were not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


def snapshot(cache, name=NAME, commit=HASH, ref=HASH):
    """An empty snapshot as the package lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(ref)
    return folder


def pipeline(cache):
    return sparse_hub_folder(snapshot(cache), "flux", "diffusers/flux1-schnell.transformer")


def test_the_cache_is_where_the_package_has_it(monkeypatch):
    """The package reads its variables when it is imported, so another process imports it again for each setting."""
    settings = [{}, {"XDG_CACHE_HOME": "/x"}, {"HF_HOME": "/h"}, {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
                {"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"},
                {"HF_HUB_CACHE": "$HOME/c"}, {"HF_HOME": "$HOME/h"}]
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    program = f"""
import importlib, os
from huggingface_hub import constants
for setting in {settings}:
    os.environ.update(setting)
    print(importlib.reload(constants).HF_HUB_CACHE)
    for name in setting:
        del os.environ[name]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for setting, theirs in zip(settings, done.stdout.splitlines(), strict=True):
        with monkeypatch.context() as patch:
            for name, value in setting.items():
                patch.setenv(name, value)
            assert str(cache_folder()) == theirs, setting


def test_a_cached_name_is_the_snapshot_that_the_package_finds(cache, monkeypatch):
    monkeypatch.undo()  # the package itself, which reads no network where told so
    found = pipeline(cache)
    snapshot(cache, commit="f" * 40)  # a newer one that main does not name
    theirs = huggingface_hub.snapshot_download(NAME, cache_dir=cache, local_files_only=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert resolve(NAME) == resolve(cache / "models--somebody--some-model.1") == found == Path(theirs)


def test_one_snapshot_needs_no_ref_and_several_do(cache):
    folder = snapshot(cache, ref=None)
    assert resolve(cache / "models--somebody--some-model.1") == folder
    snapshot(cache, commit="f" * 40, ref="e" * 40)
    with pytest.raises(FileNotFoundError, match="models--somebody--some-model.1 has no snapshot that refs/main names"):
        resolve(cache / "models--somebody--some-model.1")


def test_paths_and_bundled_names_go_before_names_on_the_hub(cache, tmp_path, monkeypatch):
    pipeline(cache)
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME) == Path(NAME)
    assert resolve("tiny-sd3") == BUNDLED["tiny-sd3"]


@pytest.mark.parametrize("text", ["nowhere", "models/flux1-dev.safetensors", "models/x.gguf", "a/b/c", "/a/b", "../b",
                                  "models/flux.ckpt", "-x/y"])
def test_what_is_meant_as_a_path_is_never_downloaded(text):
    known = ", ".join(BUNDLED)
    with pytest.raises(FileNotFoundError, match=f"give a .safetensors file, a folder with one, one of {known}, or a"):
        resolve(text)


def test_without_the_package_the_error_names_a_command_that_works(cache, without_package, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither a path nor in the cache") as error:
        load_transformer(NAME)
    assert str(cache) in str(error.value)
    install, download = re.search("`(.*)`", str(error.value))[1].split(" && ")
    assert install == "pip install huggingface_hub" and download == f'hf download {NAME} --include "transformer/*"'
    # The program accepts these words: offline it fails for want of the files (1), not of a right call (2).
    program = Path(sys.executable).with_name("hf")
    done = subprocess.run([program, *shlex.split(download)[1:]], capture_output=True, text=True, env={
        "PATH": "", "HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)})
    assert done.returncode == 1 and "Usage" not in done.stderr, done.stderr
    with pytest.raises(FileNotFoundError, match=f"run `pip install huggingface_hub && hf download {NAME}`"):
        resolve(NAME)


def test_inspect_never_downloads(cache):
    with pytest.raises(FileNotFoundError, match=f"run `hf download {NAME}`"):
        weights.inspect_checkpoint(NAME)
    folder = pipeline(cache)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert weights.inspect_checkpoint(NAME).missing.keys() == {"autoencoder"}


# What the repositories hold, in short: True for what a pipeline reads.
REPOSITORY = {
    ".gitattributes": False, "LICENSE.md": False, "README.md": False, "dev_grid.jpg": False, "model_index.json": True,
    "ae.safetensors": False, "flux1-dev.safetensors": False, "sd3.5_large.safetensors": False,
    "SD3.5L_example_workflow.json": False, "text_encoders/clip_g.safetensors": False,
    "text_encoders/t5xxl_fp8_e4m3fn.safetensors": False, "scheduler/scheduler_config.json": True,
    "text_encoder/config.json": True, "text_encoder/model.safetensors": True,
    "text_encoder/model.fp16.safetensors": False, "text_encoder/pytorch_model.bin": False,
    "text_encoder_2/model-00001-of-00002.safetensors": True, "text_encoder_2/model.safetensors.index.json": True,
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": False,
    "text_encoder_3/model.safetensors.index.fp16.json": False, "tokenizer/merges.txt": True,
    "tokenizer/vocab.json": True, "tokenizer/special_tokens_map.json": True, "tokenizer_2/spiece.model": True,
    "tokenizer_2/tokenizer.json": True, "transformer/config.json": True,
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": True,
    "transformer/diffusion_pytorch_model.safetensors.index.json": True, "vae/config.json": True,
    "vae/diffusion_pytorch_model.safetensors": True, "vae/diffusion_flax_model.msgpack": False,
    "vae/model.onnx": False,
}


@pytest.fixture
def downloads(cache, monkeypatch):
    """What was asked of `snapshot_download`, which makes a whole pipeline."""
    asked = []

    def download(name, **how):
        asked.append({"name": name, **how})
        existing = cache / "models--somebody--some-model.1" / "snapshots" / HASH
        return str(existing if existing.is_dir() else pipeline(cache))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("component", [None, "vae"])
def test_only_what_a_pipeline_reads_is_downloaded(cache, downloads, component):
    folder = resolve(NAME, component)
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    (asked,) = downloads
    assert asked["name"] == NAME and asked["cache_dir"] == cache_folder() == cache
    assert asked.get("tqdm_class") is None  # the package's own progress bar
    taken = filter_repo_objects(REPOSITORY, allow_patterns=asked["allow_patterns"],
                                ignore_patterns=asked["ignore_patterns"])
    wanted = [file for file, read in REPOSITORY.items() if read]
    if component:
        wanted = [file for file in wanted if file.startswith((component, "model_index"))]
    assert list(taken) == wanted
    assert resolve(NAME, component) == resolve(NAME) == folder and len(downloads) == 1  # now it is in the cache


@pytest.mark.parametrize("lost", [
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors", "transformer", "text_encoder_2",
    "vae/diffusion_pytorch_model.safetensors", "tokenizer", "model_index.json",
])
def test_a_download_that_broke_off_goes_on(cache, downloads, without_package, monkeypatch, lost):
    folder = pipeline(cache)
    assert resolve(NAME) == folder
    target = folder / lost
    moved = target.rename(cache / "away")
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="only in part in the cache"):
        resolve(NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", huggingface_hub)
    with pytest.raises(FileNotFoundError, match=f"run `hf download {NAME} FILE`"):  # what came was no more
        resolve(NAME)
    assert len(downloads) == 1 and resolve(NAME, download=False) == folder
    moved.rename(target)
    assert resolve(NAME) == folder and len(downloads) == 1


def test_original_files_in_the_cache_are_found_by_name(cache):
    folder, model = snapshot(cache), MMDiT(SD3)
    save_transformer(model, folder / "sd3_tiny.safetensors")
    same_tensors(load_transformer(NAME).state_dict(), model.state_dict())


def test_links_into_the_blobs_are_followed(cache):
    folder = snapshot(cache, "black-forest-labs/FLUX.1-schnell")
    blob = sparse_file(cache / "models--black-forest-labs--FLUX.1-schnell" / "blobs" / "abc",
                       shapes_of("bfl/flux1-schnell"))
    (folder / "flux1-schnell.safetensors").symlink_to(blob)
    found = weights.inspect_checkpoint("black-forest-labs/FLUX.1-schnell")
    assert found.variant == "flux1-schnell" and found.components[0].where == "flux1-schnell.safetensors"


def test_a_failed_download_is_one_clear_error(cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{NAME} is not in the cache .* could not be downloaded") as error:
        resolve(NAME)
    assert "LocalEntryNotFoundError" in str(error.value) and "\n" not in str(error.value)


def test_a_repository_of_single_files_says_so(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot(cache)))
    with pytest.raises(FileNotFoundError, match=f"no model_index.json .* run `hf download {NAME} FILE`"):
        resolve(NAME)


def test_unreadable_indices_are_not_whole(cache, downloads):
    folder = pipeline(cache)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(FileNotFoundError, match="no model_index.json with all its files"):
        resolve(NAME)
    assert len(downloads) == 1
