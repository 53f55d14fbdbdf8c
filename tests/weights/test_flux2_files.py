"""FLUX.2's files at full size: what they are taken for, what is missing, and one sentence where a pipeline ends."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from small_models import FLUX2, difference, draw, randomize, same_tensors
from sparse import shapes_of, sharded, sparse_file

import weights
from mmdit import PRESETS, MMDiT
from sampler import Pipeline
from weights import CheckpointError

DATA = Path(__file__).parents[1] / "data"
DEV, NINE, FOUR = "bfl/flux2-dev", "bfl/flux2-klein-9b", "bfl/flux2-klein-4b"


def scaled_float8(name, shape):
    return "F32" if name.endswith(("weight_scale", "input_scale")) else (
        "F8_E4M3" if "_blocks." in name and len(shape) > 1 else "BF16")


def taken_for(path):
    found = weights.inspect_checkpoint(path)
    assert found.family == "flux2" and weights.open_part(found.parts["transformer"]).config == PRESETS[found.variant]
    return found.variant, found.told


@pytest.mark.parametrize(("path", "manifest", "variant", "told"), [
    ("flux2-dev.safetensors", DEV, "flux2-dev", ""), ("any.safetensors", DEV, "flux2-dev", ""),
    ("flux-2-klein-9b.safetensors", NINE, "flux2-klein-9b", "by its name"),
    ("flux-2-klein-9b-kv.safetensors", NINE, "flux2-klein-9b-kv", "by its name"),
    ("flux-2-klein-base-9b.safetensors", NINE, "flux2-klein-base-9b", "by its name"),
    ("flux-2-klein-4b.safetensors", FOUR, "flux2-klein-4b", "by its name"),
    ("flux-2-klein-base-4b.safetensors", FOUR, "flux2-klein-base-4b", "by its name"),
    ("FLUX.2-klein-base-4B/x.safetensors", FOUR, "flux2-klein-base-4b", "by its name"),
    ("base models/any.safetensors", FOUR, "flux2-klein-4b", "assumed: its name does not tell"),
    ("any.safetensors", NINE, "flux2-klein-9b", "assumed: its name does not tell"),
    ("any.safetensors", "diffusers/flux2-dev.transformer", "flux2-dev", ""),
    ("klein_base.safetensors", "diffusers/flux2-klein-4b.transformer", "flux2-klein-base-4b", "by its name"),
])
def test_variants_are_told_by_sizes_and_the_base_by_its_name(tmp_path, path, manifest, variant, told):
    assert taken_for(sparse_file(tmp_path / "x" / "y" / path, shapes_of(manifest))) == (variant, told)
    prefixed = sparse_file(tmp_path / "x" / "z" / path, shapes_of(manifest, "model.diffusion_model."))
    assert taken_for(prefixed) == (variant, told)


@pytest.mark.parametrize(("manifest", "variant"), [
    (f"{NINE}-fp8", "flux2-klein-9b"), (f"{FOUR}-fp8", "flux2-klein-4b")])
def test_scaled_float8_files_are_recognized(tmp_path, manifest, variant):
    file = sparse_file(tmp_path / f"{variant}-fp8.safetensors", shapes_of(manifest), scaled_float8)
    assert taken_for(file) == (variant, "by its name")
    entries = weights.inspect_checkpoint(file).parts["transformer"].entries
    assert entries.keys() == shapes_of(manifest.removesuffix("-fp8")).keys()
    assert all((entry.dtype == "F8_E4M3") == (entry.scale is not None) for entry in entries.values())


def hub_folder(path, manifest, **index):
    sharded(path / "transformer", shapes_of(f"diffusers/{manifest}.transformer"), 2)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    about = {folder.name: ["diffusers", "Class"] for folder in path.iterdir()}
    (path / "model_index.json").write_text(json.dumps(about | index))
    return path


@pytest.mark.parametrize(("name", "index", "variant"), [
    ("any", {"is_distilled": True}, "flux2-klein-4b"), ("any", {"is_distilled": False}, "flux2-klein-base-4b"),
    ("FLUX.2-klein-base-4B", {}, "flux2-klein-base-4b"), ("FLUX.2-klein-4B", {}, "flux2-klein-4b"),
    ("my klein", {"is_distilled": False}, "flux2-klein-base-4b"),
])
def test_a_hub_folder_says_whether_it_is_distilled(tmp_path, name, index, variant):
    folder = hub_folder(tmp_path / name, "flux2-klein-4b", _class_name="Flux2KleinPipeline", **index)
    found = weights.inspect_checkpoint(folder)
    assert (found.family, found.variant) == ("flux2", variant)
    assert found.missing.keys() == {"autoencoder", "text"} and found.tokenizers.keys() == {"text"}
    shutil.rmtree(folder / "transformer")
    for class_name in ("Flux2Pipeline", "Flux2KleinPipeline"):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
        with pytest.raises(FileNotFoundError):  # not: another family's pipeline
            weights.inspect_checkpoint(folder)


@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_what_a_pipeline_of_flux2_lacks_is_named(tmp_path, whole):
    path = tmp_path / "FLUX.2-dev"
    if whole:
        hub_folder(path, "flux2-dev", _class_name="Flux2Pipeline")
    else:
        path = sparse_file(path / "flux2-dev.safetensors", shapes_of(DEV))
    lacks = r"autoencoder \(vae/ or flux2-vae.safetensors\), text \(text_encoder/ or qwen_3_4b.safetensors\)"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))} is no whole pipeline, it lacks {lacks}"):
        Pipeline.load(path)


@pytest.mark.parametrize(("name", "class_name", "variant"), [
    ("any", "Flux2KleinKVPipeline", "flux2-klein-9b-kv"), ("any", "Flux2KleinPipeline", "flux2-klein-9b"),
    ("FLUX.2-klein-9b-kv", "Flux2KleinKVPipeline", "flux2-klein-9b-kv"),
    ("klein-kv", "Flux2KleinPipeline", "flux2-klein-9b"),
])
def test_a_hub_folder_says_whether_it_is_kv(tmp_path, name, class_name, variant):
    folder = hub_folder(tmp_path / name, "flux2-klein-9b", _class_name=class_name, is_distilled=True)
    assert weights.inspect_checkpoint(folder).variant == variant


def test_a_flux2_with_heads_of_another_width_needs_its_config(tmp_path):
    model = randomize(MMDiT(FLUX2))
    weights.save_transformer(model, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="heads are 32 wide.*in FLUX.2 four times 32.*give config=MMDiTConfig"):
        weights.load_transformer(tmp_path / "x.safetensors")
    again = weights.load_transformer(tmp_path / "x.safetensors", FLUX2)
    same_tensors(again.state_dict(), model.state_dict())
    inputs = draw(2, 8, 3, 4), torch.tensor([0.3, 0.9]), draw(2, 5, 24)
    assert difference(again(*inputs), model(*inputs)) == 0


def test_klein_4b_at_full_size_opens_as_a_pipeline(tmp_path):
    """The usual mix: an original transformer beside the hub's folders. Nothing is read but headers and tokenizer."""
    folder = tmp_path / "FLUX.2-klein-4B"
    sparse_file(folder / "flux-2-klein-4b.safetensors", shapes_of(FOUR))
    sparse_file(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes_of("diffusers/flux2.vae"),
                lambda name, _: "I64" if name.endswith("batches_tracked") else "F32")
    sparse_file(folder / "text_encoder" / "model.safetensors", shapes_of("text/qwen3-4b"))
    shutil.copytree(DATA / "flux2-tokenizer", folder / "tokenizer")
    pipeline = Pipeline.load(folder / "flux-2-klein-4b.safetensors")
    assert (pipeline.config, pipeline.downscale) == (PRESETS["flux2-klein-4b"], 16)
    assert torch.allclose(pipeline.sigmas(4, 1024, 1024), torch.tensor([1, 0.96738, 0.90814, 0.76720, 0]), atol=1e-5)
    decoder = pipeline.text.decoder.module
    for module, billions in ((pipeline.transformer, 3.875544576), (decoder, 3.114088192)):
        assert sum(parameter.numel() for parameter in module.parameters()) == round(billions * 1e9)
