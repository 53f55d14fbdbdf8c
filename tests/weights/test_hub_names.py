"""Names on the hub: found in huggingface_hub's cache, else downloaded by it (here, never over the network)."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from sparse import shapes_of, sparse_file, sparse_hub_folder

import weights
from weights import BUNDLED, resolve

NAME, HASH = "somebody/some-model.1", "0" * 39 + "1"
from_package = huggingface_hub.snapshot_download


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; whoever downloads without asking fails."""
    def refuse(name, local_files_only=False, **how):
        assert local_files_only, "a download was started"
        return from_package(name, local_files_only=True, **how)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    return tmp_path / "cache"


def snapshot(cache, name=NAME, commit=HASH):
    """An empty snapshot as the package lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(HASH)
    return folder


def pipeline(cache):
    return sparse_hub_folder(snapshot(cache), "flux", "diffusers/flux1-schnell.transformer")


def test_a_name_and_its_folder_in_the_cache_stand_for_the_snapshot_that_main_names(cache):
    found = pipeline(cache)
    snapshot(cache, commit="f" * 40)  # a newer one that main does not name
    assert resolve(NAME) == resolve(cache / "models--somebody--some-model.1") == found


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


def test_inspect_never_downloads(cache):
    with pytest.raises(FileNotFoundError, match=f"{NAME}: the hub's cache lacks every file, .*`hf download {NAME}`"):
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
    """What was asked to be downloaded, which makes a whole pipeline."""
    asked = []

    def download(name, local_files_only=False, **how):
        if local_files_only:
            return from_package(name, local_files_only=True, **how)
        asked.append({"name": name, **how})
        existing = cache / "models--somebody--some-model.1" / "snapshots" / HASH
        return str(existing if existing.is_dir() else pipeline(cache))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("component", [None, "vae"])
def test_only_what_a_pipeline_reads_is_downloaded(downloads, component):
    folder = resolve(NAME, component)
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    (asked,) = downloads
    assert asked["name"] == NAME
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
def test_a_download_that_broke_off_goes_on(cache, downloads, lost):
    folder = pipeline(cache)
    assert resolve(NAME) == folder
    moved = (folder / lost).rename(cache / "away")
    (folder / "vae" / "config.json").write_text("{}")
    part = lost if lost.endswith(("json", "00003.safetensors")) else lost.split("/")[0] + "/"
    with pytest.raises(FileNotFoundError, match=f"{NAME}: the hub's cache lacks {part}, .*`hf download {NAME} FILE`"):
        resolve(NAME)  # what came was no more
    assert len(downloads) == 1 and resolve(NAME, download=False) == folder
    moved.rename(folder / lost)
    assert resolve(NAME) == folder and len(downloads) == 1


def test_links_into_the_blobs_are_followed_and_those_that_lead_nowhere_are_missing(cache, downloads):
    folder = snapshot(cache, "black-forest-labs/FLUX.1-schnell")
    blob = sparse_file(cache / "models--black-forest-labs--FLUX.1-schnell" / "blobs" / "abc",
                       shapes_of("bfl/flux1-schnell"))
    (folder / "flux1-schnell.safetensors").symlink_to(blob)
    found = weights.inspect_checkpoint("black-forest-labs/FLUX.1-schnell")
    assert found.variant == "flux1-schnell"
    assert found.parts["transformer"].path == folder / "flux1-schnell.safetensors"

    file = pipeline(cache) / "vae" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to(cache / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{NAME}: the hub's cache lacks vae/,"):
        resolve(NAME)
    assert len(downloads) == 1


def test_a_failed_download_is_one_clear_error(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_package)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (rf"^{NAME}: the hub's cache lacks every file, and there is no download of it \(.*\): check name and "
               rf"network, .*`hf auth login`, then `hf download {NAME}`, or")
    with pytest.raises(FileNotFoundError, match=message):
        resolve(NAME)
    (pipeline(cache) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, local_files_only=False, **how: from_package(
        NAME, local_files_only=True, **how) if local_files_only else 1 / 0)
    with pytest.raises(FileNotFoundError, match=rf"{NAME}: the hub's cache lacks vae.* \(division by zero\): check"):
        resolve(NAME)


def test_a_repository_of_single_files_says_so(cache, downloads):
    sparse_file(snapshot(cache) / "flux1-dev.safetensors", shapes_of("bfl/flux1-dev"))
    with pytest.raises(FileNotFoundError, match=f"lacks model_index.json, .*not in the hub.*`hf download {NAME} FILE`"):
        resolve(NAME)


def test_an_index_without_parts_is_none(cache, downloads):
    (pipeline(cache) / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(FileNotFoundError, match=f"{NAME}: the hub's cache lacks model_index.json,"):
        resolve(NAME)
    assert len(downloads) == 1
