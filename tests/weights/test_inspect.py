"""`weights.inspect_checkpoint` and `python -m weights`, on files with the public names and shapes at full size."""

import io
import json
import re
import sys
import time
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SD3, randomize
from sparse import shapes_of, sparse_file, sparse_hub_folder

import weights
from mmdit import MMDiT
from weights import CheckpointError, inspection
from weights import __main__ as cli

DIT, VAE = "model.diffusion_model.", "first_stage_model."
VAE_PARAMETERS = 83_819_683
T5_PARAMETERS = 4_762_310_656  # T5-XXL's encoder; its file holds the embedding twice
FLUX_LACKS = {"autoencoder", "clip_l", "t5", "tokenizer", "tokenizer_2"}
SD3_LACKS = {"clip_l", "clip_g", "tokenizer", "tokenizer_2"}


def text_encoders(names):
    """The text encoders of a merged file, under their prefixes."""
    return {name: shape for manifest in names
            for name, shape in shapes_of(f"text/{manifest}", f"text_encoders.{manifest}.transformer.").items()}


def float8(name, shape):
    return "F8_E4M3" if len(shape) > 1 else "BF16"


# ---- single files


@pytest.mark.parametrize(("name", "manifest", "variant", "billions"), [  # parameters in billions as published
    ("flux1-dev", "bfl/flux1-dev", "flux1-dev", 11.90),
    ("flux1-kontext-dev", "bfl/flux1-dev", "flux1-kontext-dev", 11.90),
    ("flux1-dev-kontext_fp8_scaled", "bfl/flux1-dev", "flux1-kontext-dev", 11.90),
    ("any", "bfl/flux1-dev", "flux1-dev or flux1-kontext-dev", 11.90),
    ("any", "diffusers/flux1-dev.transformer", "flux1-dev or flux1-kontext-dev", 11.90),
    ("any", "bfl/flux1-schnell", "flux1-schnell", 11.89),
    ("any", "diffusers/flux1-schnell.transformer", "flux1-schnell", 11.89),
    ("any", "sai/sd3_medium", "sd3-medium", 2.03),
    ("any", "diffusers/sd3-medium.transformer", "sd3-medium", 2.03),
    ("any", "sai/sd3.5_medium", "sd3.5-medium", 2.24),
    ("any", "diffusers/sd3.5-medium.transformer", "sd3.5-medium", 2.24),
    ("sd3.5_large", "sai/sd3.5_large", "sd3.5-large", 8.06),
    ("sd3.5_large_turbo", "sai/sd3.5_large", "sd3.5-large-turbo", 8.06),
    ("any", "sai/sd3.5_large", "sd3.5-large or sd3.5-large-turbo", 8.06),
    ("any", "diffusers/sd3.5-large.transformer", "sd3.5-large or sd3.5-large-turbo", 8.06),
])
def test_files_with_a_transformer(tmp_path, name, manifest, variant, billions):
    file = sparse_file(tmp_path / f"{name}.safetensors", shapes_of(manifest))
    found = weights.inspect_checkpoint(file)
    transformer, *others = found.components
    assert found.family == transformer.layout.split()[1] == ("FLUX.1" if "flux" in manifest else "SD3")
    assert found.variant == variant
    assert transformer.layout.split()[0] == ("hub" if manifest.startswith("diffusers") else "original")
    assert (transformer.role, transformer.where) == ("transformer", file.name)
    assert transformer.dtypes.keys() == {"BF16"}
    assert transformer.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    merged = manifest.startswith("sai")
    assert [(c.role, c.prefix, c.parameters) for c in others] == [("autoencoder", VAE, VAE_PARAMETERS)] * merged
    lacks = FLUX_LACKS if "flux" in manifest else SD3_LACKS if merged else {*SD3_LACKS, "autoencoder"}
    assert found.missing.keys() == lacks
    assert found.optional.keys() == (set() if "flux" in manifest else {"t5", "tokenizer_3"})
    assert sum(c.bytes for c in found.components) == 2 * sum(map(prod, shapes_of(manifest).values()))


@pytest.mark.parametrize(("manifest", "role", "parameters"), [
    ("bfl/ae", "autoencoder", VAE_PARAMETERS), ("diffusers/sd3.vae", "autoencoder", VAE_PARAMETERS),
    ("text/clip_l", "clip_l", 123_060_480), ("text/clip_l.projection", "clip_l", 123_650_304),
    ("text/clip_g", "clip_g", 694_659_840), ("text/t5xxl", "t5", T5_PARAMETERS),
])
def test_files_without_a_transformer(tmp_path, manifest, role, parameters):
    found = weights.inspect_checkpoint(sparse_file(tmp_path / "any.safetensors", shapes_of(manifest)))
    assert (found.family, found.variant, found.missing) == (None, None, {})
    assert [(c.role, c.parameters) for c in found.components] == [(role, parameters)]


def test_sd3_with_everything_but_its_tokenizers(tmp_path):
    tensors = shapes_of("sai/sd3_medium") | text_encoders(["clip_l", "clip_g", "t5xxl"])
    file = sparse_file(tmp_path / "sd3_medium_incl_clips_t5xxlfp8.safetensors", tensors,
                       lambda name, shape: "F8_E4M3" if "t5xxl" in name and len(shape) > 1 else "F16")
    found = weights.inspect_checkpoint(file)
    assert [(c.role, c.prefix) for c in found.components] == [
        ("transformer", DIT), ("autoencoder", VAE), ("clip_l", "text_encoders.clip_l.transformer."),
        ("clip_g", "text_encoders.clip_g.transformer."), ("t5", "text_encoders.t5xxl.transformer.")]
    assert found.components[-1].dtypes == {"F8_E4M3": 24 * 7 + 2, "F16": 24 * 2 + 1}  # 2: embedding, relative bias
    assert found.missing.keys() == {"tokenizer", "tokenizer_2"} and found.optional.keys() == {"tokenizer_3"}


@pytest.mark.parametrize("prefix", ["", DIT])
def test_flux_in_float8_with_everything_but_its_tokenizers(tmp_path, prefix):
    tensors = shapes_of("bfl/flux1-dev", prefix) | shapes_of("bfl/ae", "vae.") | text_encoders(["clip_l", "t5xxl"])
    found = weights.inspect_checkpoint(sparse_file(tmp_path / "flux1-dev-fp8.safetensors", tensors, float8))
    assert (found.family, found.variant) == ("FLUX.1", "flux1-dev")
    assert [(c.role, c.prefix, c.parameters) for c in found.components] == [
        ("transformer", prefix, 11_901_408_320), ("autoencoder", "vae.", VAE_PARAMETERS),
        ("clip_l", "text_encoders.clip_l.transformer.", 123_060_480),
        ("t5", "text_encoders.t5xxl.transformer.", T5_PARAMETERS)]
    matrices = sum(len(shape) > 1 for shape in shapes_of("bfl/flux1-dev").values())
    assert found.components[0].dtypes == {"F8_E4M3": matrices, "BF16": 780 - matrices}
    assert found.missing.keys() == {"tokenizer", "tokenizer_2"}


def test_scales_belong_to_their_matrices(tmp_path):
    tensors, matrix = shapes_of("bfl/flux1-schnell"), "double_blocks.0.img_attn.qkv"
    plain = weights.inspect_checkpoint(sparse_file(tmp_path / "plain.safetensors", tensors, float8)).components[0]
    tensors |= {f"{matrix}.scale_weight": (), "scaled_fp8": (2,)}
    scaled = sparse_file(tmp_path / "scaled.safetensors", tensors,
                         lambda name, shape: "F32" if name.endswith("scale_weight") else float8(name, shape))
    scaled = weights.inspect_checkpoint(scaled).components[0]
    assert scaled.dtypes["F8_E4M3 scaled"] == 1 and scaled.dtypes["F8_E4M3"] == plain.dtypes["F8_E4M3"] - 1
    assert scaled.parameters == plain.parameters and scaled.bytes == plain.bytes + 4


def test_24_gb_are_recognized_in_under_a_second(tmp_path):
    file = sparse_file(tmp_path / "flux1-dev.safetensors", shapes_of("bfl/flux1-dev"))
    assert file.stat().st_size > 23.8e9
    start = time.process_time()  # CPU time: by the clock, whatever else runs on the machine would be measured too
    assert weights.inspect_checkpoint(file).variant == "flux1-dev"
    assert time.process_time() - start < 1


# ---- folders


@pytest.mark.parametrize(("name", "family", "transformer", "variant"), [
    ("FLUX.1-dev", "flux", "flux1-dev", "flux1-dev"), ("FLUX.1-Kontext-dev", "flux", "flux1-dev", "flux1-kontext-dev"),
    ("stable-diffusion-3.5-large", "sd3", "sd3.5-large", "sd3.5-large"),
    ("stable-diffusion-3.5-large-turbo", "sd3", "sd3.5-large", "sd3.5-large-turbo"),
])
def test_pipelines_as_the_hub_has_them(tmp_path, monkeypatch, name, family, transformer, variant):
    cached = tmp_path / f"models--somebody--{name}"
    folder = sparse_hub_folder(cached / "snapshots" / "0123abc", family, f"diffusers/{transformer}.transformer")
    sparse_file(folder / "ae.safetensors", shapes_of("bfl/ae"))  # the original files beside
    sparse_file(folder / "text_encoders" / "t5xxl_fp16.safetensors", shapes_of("text/t5xxl"), "F16")
    sparse_file(folder / "text_encoder" / "model.fp16.safetensors", {"narrow": (1,)}, "F16")
    found = weights.inspect_checkpoint(folder)
    roles = {"transformer/": "transformer", "vae/": "autoencoder", "text_encoder/": "clip_l"}
    roles |= {"text_encoder_2/": "t5"} if family == "flux" else {"text_encoder_2/": "clip_g", "text_encoder_3/": "t5"}
    assert {c.where: c.role for c in found.components} == roles
    assert {c.where: c.files for c in found.components if c.files > 1} == {"transformer/": 3}
    assert found.variant == variant and not found.missing and not found.optional
    assert found.beside == {"ae.safetensors": "holds autoencoder",
                            "text_encoders/t5xxl_fp16.safetensors": "holds t5"}
    kinds = ["CLIP", "T5"] if family == "flux" else ["CLIP", "CLIP", "T5"]
    assert list(found.tokenizers.values()) == kinds and found.scheduler == "scheduler/scheduler_config.json"

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert weights.inspect_checkpoint(f"somebody/{name}") == weights.inspect_checkpoint(cached) == found
    assert weights.inspect_checkpoint(folder / "transformer").variant == variant
    for lost in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                 "text_encoder/model.fp16.safetensors", "tokenizer/merges.txt"):
        (folder / lost).unlink()
    found = weights.inspect_checkpoint(folder)
    assert {c.where for c in found.components if c.role == "autoencoder"} == {"ae.safetensors"}
    assert found.missing.keys() == {"clip_l", "tokenizer" if family == "flux" else "tokenizer_2"}


def test_text_encoders_of_unusual_width_are_told_by_their_folders():
    found = weights.inspect_checkpoint("tiny-sd3")
    roles = {c.where: c.role for c in found.components}
    assert roles["text_encoder/"] == "clip_l" and roles["text_encoder_2/"] == "clip_g"
    assert (found.family, found.variant, found.missing, found.optional) == ("SD3", "of its own", {}, {})


def test_a_folder_of_original_files(tmp_path):
    sparse_file(tmp_path / "flux1-schnell.safetensors", shapes_of("bfl/flux1-schnell"))
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"))
    sparse_file(tmp_path / "lora.safetensors", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 8)})
    sparse_file(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors", shapes_of("text/t5xxl"))
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": [["a", 0.0]]}}')
    found = weights.inspect_checkpoint(tmp_path)
    assert {c.role: c.where for c in found.components} == {
        "transformer": "flux1-schnell.safetensors", "autoencoder": "ae.safetensors",
        "t5": "text_encoders/t5xxl_fp16.safetensors"}
    assert found.tokenizers == {"tokenizer.json": "T5"} and found.missing.keys() == {"clip_l", "tokenizer"}
    assert found.beside == {"lora.safetensors": "is a LoRA, a small change to a model: give the model itself"}


def test_of_several_files_the_transformer_s_own_autoencoder_counts(tmp_path):
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"))
    sparse_file(tmp_path / "sd3_medium.safetensors", shapes_of("sai/sd3_medium"))
    sparse_file(tmp_path / "sd3_medium_incl_clips.safetensors",
                shapes_of("sai/sd3_medium") | text_encoders(["clip_l", "clip_g"]))
    found = weights.inspect_checkpoint(tmp_path)
    assert {c.role: c.where for c in found.components} == {
        "transformer": "sd3_medium.safetensors", "autoencoder": "sd3_medium.safetensors",
        "clip_l": "sd3_medium_incl_clips.safetensors", "clip_g": "sd3_medium_incl_clips.safetensors"}
    assert found.beside == {"ae.safetensors": "holds autoencoder"}


# ---- what is no supported model


def pickled(**how):
    """What PyTorch writes."""
    content = io.BytesIO()
    torch.save({"weight": torch.ones(9)}, content, **how)
    return content.getvalue()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    ("a.safetensors", b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page, not a checkpoint"),
    ("a.safetensors", pickled(), "a pickle of PyTorch"),
    ("a.safetensors", pickled(_use_new_zipfile_serialization=False), "a pickle"),
    ("a.ckpt", pickled(), "a pickle"),
    ("a.gguf", b"GGUF\x03\x00\x00\x00" + bytes(60), "a GGUF file"),
    ("a.safetensors", b'{"model_type": "flux"}', "JSON, not a checkpoint"),
], ids=["lfs", "html", "zip", "old pickle", "ckpt", "gguf", "json"])
def test_impostors_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is {message}"):
            weights.inspect_checkpoint(path)


@pytest.mark.parametrize(("tensors", "message"), [
    # the autoencoder and text encoder in the first two have names that we know
    ({f"{DIT}input_blocks.0.0.weight": (320, 4, 3, 3), "conditioner.embedders.0.transformer.text_model.x": (2,),
      f"{VAE}encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}, "is SDXL, whose network is no MMDiT"),
    ({f"{DIT}input_blocks.0.0.weight": (320, 4, 3, 3), "cond_stage_model.transformer.x": (2,),
      f"{VAE}encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}, "is Stable Diffusion 1 or 2, whose network"),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (16, 3072)}, "is a LoRA"),
    ({"controlnet_blocks.0.weight": (3072, 3072), "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)},
     "is a ControlNet: give the model that it controls"),
    (shapes_of("bfl/flux1-dev") | {"img_in.weight": (3072, 384)}, "reads 384 numbers a patch and returns 64, .*Fill"),
    ({"something.else": (2,)}, "no part of FLUX.1 or SD3 that is known here .its first tensor: something.else"),
    ({}, "its first tensor: none at all"),
    ({n: s for n, s in shapes_of("bfl/flux1-dev").items() if n != "img_in.weight"}, "img_in.weight is missing"),
])
def test_other_models_are_named(tmp_path, tensors, message):
    file = sparse_file(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"wrong\.safetensors.*{message}"):
        weights.inspect_checkpoint(file)


def test_folders_that_cannot_be_right_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        weights.inspect_checkpoint(tmp_path)
    flux = sparse_hub_folder(tmp_path / "flux", "flux", "diffusers/flux1-schnell.transformer")
    shard = "diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=f"{shard} is one of 3 shards: give the folder"):
        weights.inspect_checkpoint(flux / "transformer" / shard)
    (flux / "transformer" / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        weights.inspect_checkpoint(flux)
    (flux / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(CheckpointError, match="flux is a StableDiffusionXLPipeline, expected a FluxPipeline or"):
        weights.inspect_checkpoint(flux)


# ---- numbers


@pytest.fixture
def stored(tmp_path):
    """A small SD3 transformer's file, and a function that changes its tensors."""
    path = tmp_path / "x.safetensors"
    weights.save_transformer(randomize(MMDiT(SD3)), path)

    def change(**tensors):
        save_file(load_file(path) | {DIT + name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)

    return path, change


def test_nan_and_infinity_are_found_wherever_they_are(stored, monkeypatch):
    path, change = stored
    monkeypatch.setattr(inspection, "PIECE", 1000)
    assert weights.inspect_checkpoint(path).not_finite is None
    assert weights.inspect_checkpoint(path, check_numbers=True).not_finite == ()
    bias, fine = torch.zeros(128), torch.full((384,), 1e300, dtype=torch.float64)  # too large for float32, yet finite
    bias[-1] = float("-inf")
    matrix = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    matrix.view(torch.uint8)[-1, -1] = 0x7F  # this format's NaN
    half = torch.zeros(512, dtype=torch.bfloat16)
    half[0] = float("nan")
    change(joint_blocks__0__x_block__attn__proj__bias=bias, joint_blocks__0__x_block__attn__proj__weight=matrix,
           joint_blocks__1__x_block__attn__proj__scale_weight=torch.tensor(float("nan")),
           joint_blocks__1__x_block__attn__proj__weight=torch.zeros(128, 128).to(torch.float8_e5m2),
           joint_blocks__0__x_block__attn__qkv__bias=fine, joint_blocks__0__x_block__mlp__fc1__bias=half)
    found = weights.inspect_checkpoint(path, check_numbers=True)
    names = ("0.x_block.attn.proj.bias", "0.x_block.attn.proj.weight", "0.x_block.mlp.fc1.bias",
             "1.x_block.attn.proj.scale_weight")
    assert sorted(found.not_finite) == [f"{DIT}joint_blocks.{name}" for name in names]
    assert set(weights.inspect_checkpoint(path.parent, check_numbers=True).not_finite) == {
        f"x.safetensors: {name}" for name in found.not_finite}


# ---- the program


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the program in this process: exit code, what it printed, what it complained of."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["weights", *map(str, arguments)])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def test_the_program_prints_what_is_there_and_what_is_missing(call, tmp_path):
    file = sparse_file(tmp_path / "flux1-dev.safetensors", shapes_of("bfl/flux1-dev"))
    code, printed, complaint = call(file)
    assert (code, complaint) == (0, "")
    assert "flux1-dev.safetensors: FLUX.1, flux1-dev\n" in printed
    row = next(line for line in printed.splitlines() if line.startswith("transformer"))
    assert re.split(r"\s{2,}", row) == ["transformer", file.name, "original FLUX.1", "BF16", "11.90 B", "23.80 GB"]
    assert "ae.safetensors or vae/" in printed and "t5xxl_fp16.safetensors or text_encoder_2/" in printed
    assert max(map(len, printed.splitlines()[1:])) <= 100
    code, printed, _ = call(file, "--json")
    found = json.loads(printed)
    assert found["variant"] == "flux1-dev" and found["components"][0]["parameters"] == 11_901_408_320
    assert found["missing"].keys() == FLUX_LACKS


def test_exit_codes(call, stored, tmp_path):
    path, change = stored
    code, printed, complaint = call(path, "--check")
    assert code == 0 and "in no tensor" in printed and "reading" in complaint
    change(**{f"joint_blocks__{i}__x_block__attn__proj__bias": torch.full((128,), float("nan")) for i in range(2)})
    code, printed, _ = call(path, "--check")
    assert code == 1
    assert f"in 2 tensors: {DIT}joint_blocks.0.x_block.attn.proj.bias, {DIT}joint_blocks.1" in printed
    path.write_bytes(path.read_bytes()[:-5])
    for wrong in (path, tmp_path / "nowhere", "nobody/nothing"):
        code, printed, complaint = call(wrong)
        assert (code, printed) == (2, "") and complaint.startswith("error: ") and complaint.count("\n") == 1


def test_help_teaches(call, capsys):
    with pytest.raises(SystemExit, match="0"):
        call("--help")
    printed = capsys.readouterr().out
    assert "python -m weights flux1-dev.safetensors" in printed and "--check" in printed and "exit codes" in printed
