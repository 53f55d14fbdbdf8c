"""`weights.inspect_checkpoint` and `python -m weights`, on files with the public names and shapes at full size."""

import json
import re
import sys
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SD3, randomize
from sparse import shapes_of, sparse_file, sparse_hub_folder

import weights
from mmdit import MMDiT
from weights import CheckpointError
from weights import __main__ as cli

DIT, VAE = "model.diffusion_model.", "first_stage_model."
VAE_PARAMETERS = 83_819_683
T5_PARAMETERS = 4_762_310_656  # T5-XXL's encoder; its file holds the embedding twice
FLUX_LACKS = {"autoencoder", "clip_l", "t5", "tokenizer of clip_l", "tokenizer of t5"}
SD3_LACKS = {"clip_l", "clip_g", "t5", "tokenizer of clip_l", "tokenizer of clip_g", "tokenizer of t5"}


def text_encoders(names):
    """The text encoders of a merged file, under their prefixes."""
    return {name: shape for manifest in names
            for name, shape in shapes_of(f"text/{manifest}", f"text_encoders.{manifest}.transformer.").items()}


def places(found):
    """By role, the file or folder that a part is in."""
    home = found.path if found.path.is_dir() else found.path.parent
    return {role: str(part.path.relative_to(home)) for role, part in found.parts.items()}


def float8(name, shape):
    return "F8_E4M3" if len(shape) > 1 else "BF16"


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the program in this process: exit code, what it printed, what it complained of."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["weights", *map(str, arguments)])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def described(call):
    """What is found at a path, and each part as the program describes it; every part can be loaded."""
    def run(path):
        code, printed, complaint = call(path, "--json")
        about = json.loads(printed)["parts"]
        assert (code, complaint) == (0, "") and not any(part["problem"] for part in about.values())
        return weights.inspect_checkpoint(path), about

    return run


# ---- single files


@pytest.mark.parametrize(("name", "manifest", "variant", "told", "billions"), [  # parameters in billions as published
    ("flux1-dev", "bfl/flux1-dev", "flux1-dev", "by its name", 11.90),
    ("flux1-kontext-dev", "bfl/flux1-dev", "flux1-kontext-dev", "by its name", 11.90),
    ("flux1-dev-kontext_fp8_scaled", "bfl/flux1-dev", "flux1-kontext-dev", "by its name", 11.90),
    ("any", "bfl/flux1-dev", "flux1-dev", "assumed: its name does not tell", 11.90),
    ("any", "diffusers/flux1-dev.transformer", "flux1-dev", "assumed: its name does not tell", 11.90),
    ("any", "bfl/flux1-schnell", "flux1-schnell", "assumed: its name does not tell", 11.89),
    ("flux1-schnell", "diffusers/flux1-schnell.transformer", "flux1-schnell", "by its name", 11.89),
    ("flux-dev-de-distill", "bfl/flux1-schnell", "flux1-dev-de-distill", "by its name", 11.89),
    ("any", "sai/sd3_medium", "sd3-medium", "", 2.03),
    ("any", "diffusers/sd3-medium.transformer", "sd3-medium", "", 2.03),
    ("any", "sai/sd3.5_medium", "sd3.5-medium", "", 2.24),
    ("any", "diffusers/sd3.5-medium.transformer", "sd3.5-medium", "", 2.24),
    ("sd3.5_large", "sai/sd3.5_large", "sd3.5-large", "by its name", 8.06),
    ("sd3.5_large_turbo", "sai/sd3.5_large", "sd3.5-large-turbo", "by its name", 8.06),
    ("any", "sai/sd3.5_large", "sd3.5-large", "assumed: its name does not tell", 8.06),
    ("any", "diffusers/sd3.5-large.transformer", "sd3.5-large", "assumed: its name does not tell", 8.06),
])
def test_files_with_a_transformer(described, tmp_path, name, manifest, variant, told, billions):
    file = sparse_file(tmp_path / f"{name}.safetensors", shapes_of(manifest))
    found, about = described(file)
    transformer = about.pop("transformer")
    assert found.family == ("flux" if "flux" in manifest else "sd3")
    assert (found.variant, found.told) == (variant, told)
    which = "hub" if manifest.startswith("diffusers") else "original"
    assert transformer["layout"] == f"{which} {'FLUX.1' if found.family == 'flux' else 'SD3'}"
    assert transformer["dtype"] == "BF16" and places(found)["transformer"] == file.name
    assert transformer["parameters"] / 1e9 == pytest.approx(billions, abs=0.005)
    merged = manifest.startswith("sai")
    assert [(role, part["in"], part["parameters"]) for role, part in about.items()] == [
        ("autoencoder", f"{file}: {VAE}*", VAE_PARAMETERS)] * merged
    lacks = FLUX_LACKS if "flux" in manifest else SD3_LACKS if merged else {*SD3_LACKS, "autoencoder"}
    assert found.missing.keys() == lacks
    tensors = 2 * sum(torch.Size(shape).numel() for shape in shapes_of(manifest).values())
    assert sum(part["bytes"] for part in (transformer, *about.values())) == tensors
    for given in {"flux": ("flux1-schnell", "flux1-dev"), "sd3": ("sd3-medium", "sd3.5-medium")}[found.family]:
        # the caller knows better than name and sizes
        assert weights.inspect_checkpoint(file, variant=given).variant == given
    with pytest.raises(CheckpointError, match="variant must be one of flux1-kontext-dev, .*, got 'flux'"):
        weights.inspect_checkpoint(file, variant="flux")


@pytest.mark.parametrize(("manifest", "role", "parameters"), [
    ("bfl/ae", "autoencoder", VAE_PARAMETERS), ("text/clip_l", "clip_l", 123_060_480),
    ("text/clip_l.projection", "clip_l", 123_650_304), ("text/clip_g", "clip_g", 694_659_840),
    ("text/t5xxl", "t5", T5_PARAMETERS),
])
def test_files_without_a_transformer(described, tmp_path, manifest, role, parameters):
    found, about = described(sparse_file(tmp_path / "any.safetensors", shapes_of(manifest)))
    assert (found.family, found.variant, found.missing) == (None, None, {})
    assert {role: part["parameters"] for role, part in about.items()} == {role: parameters}


def test_sd3_with_everything_but_its_tokenizers(described, tmp_path):
    tensors = shapes_of("sai/sd3_medium") | text_encoders(["clip_l", "clip_g", "t5xxl"])
    file = sparse_file(tmp_path / "sd3_medium_incl_clips_t5xxlfp8.safetensors", tensors,
                       lambda name, shape: "F8_E4M3" if "t5xxl" in name and len(shape) > 1 else "F16")
    found, about = described(file)
    assert {role: part.prefix for role, part in found.parts.items()} == {
        "transformer": DIT, "autoencoder": VAE, "clip_l": "text_encoders.clip_l.transformer.",
        "clip_g": "text_encoders.clip_g.transformer.", "t5": "text_encoders.t5xxl.transformer."}
    assert about["t5"]["dtype"] == f"{24 * 7 + 2} × F8_E4M3, {24 * 2 + 1} × F16"  # 2: embedding, relative bias
    assert found.missing.keys() == {name for name in SD3_LACKS if name.startswith("tokenizer")}


@pytest.mark.parametrize("prefix", ["", DIT])
def test_flux_in_float8_with_everything_but_its_tokenizers(described, tmp_path, prefix):
    tensors = shapes_of("bfl/flux1-dev", prefix) | shapes_of("bfl/ae", "vae.") | text_encoders(["clip_l", "t5xxl"])
    found, about = described(sparse_file(tmp_path / "flux1-dev-fp8.safetensors", tensors, float8))
    assert (found.family, found.variant) == ("flux", "flux1-dev")
    assert {role: (found.parts[role].prefix, part["parameters"]) for role, part in about.items()} == {
        "transformer": (prefix, 11_901_408_320), "autoencoder": ("vae.", VAE_PARAMETERS),
        "clip_l": ("text_encoders.clip_l.transformer.", 123_060_480),
        "t5": ("text_encoders.t5xxl.transformer.", T5_PARAMETERS)}
    matrices = sum(len(shape) > 1 for shape in shapes_of("bfl/flux1-dev").values())
    assert about["transformer"]["dtype"] == f"{matrices} × F8_E4M3, {780 - matrices} × BF16"
    assert found.missing.keys() == {"tokenizer of clip_l", "tokenizer of t5"}


def test_scales_belong_to_their_matrices(described, tmp_path):
    tensors, matrix = shapes_of("bfl/flux1-schnell"), "double_blocks.0.img_attn.qkv"
    plain = described(sparse_file(tmp_path / "1" / "plain.safetensors", tensors, float8))[1]["transformer"]
    tensors |= {f"{matrix}.scale_weight": (), "scaled_fp8": (2,)}
    scaled = sparse_file(tmp_path / "2" / "scaled.safetensors", tensors,
                         lambda name, shape: "F32" if name.endswith("scale_weight") else float8(name, shape))
    scaled = described(scaled)[1]["transformer"]
    assert "1 × F8_E4M3 scaled" in scaled["dtype"]
    assert scaled["parameters"] == plain["parameters"] and scaled["bytes"] == plain["bytes"] + 4


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
def test_pipelines_as_the_hub_has_them(described, tmp_path, monkeypatch, name, family, transformer, variant):
    cached = tmp_path / f"models--somebody--{name}"
    folder = sparse_hub_folder(cached / "snapshots" / "0123abc", family, f"diffusers/{transformer}.transformer")
    sparse_file(folder / "ae.safetensors", shapes_of("bfl/ae"))  # the original files beside
    sparse_file(folder / "text_encoders" / "t5xxl_fp16.safetensors", shapes_of("text/t5xxl"), "F16")
    sparse_file(folder / "text_encoder" / "model.fp16.safetensors", {"narrow": (1,)}, "F16")
    found, _ = described(folder)
    roles = {"transformer": "transformer", "autoencoder": "vae", "clip_l": "text_encoder"}
    roles |= {"t5": "text_encoder_2"} if family == "flux" else {"clip_g": "text_encoder_2", "t5": "text_encoder_3"}
    assert places(found) == roles
    assert len({entry.file for entry in found.parts["transformer"].entries.values()}) == 3
    assert found.variant == variant and not found.missing
    assert found.beside == {folder / "ae.safetensors": "holds autoencoder",
                            folder / "text_encoders" / "t5xxl_fp16.safetensors": "holds t5"}
    assert {role: place.name for role, place in found.tokenizers.items()} == {
        role: f"tokenizer{roles[role].removeprefix('text_encoder')}" for role in list(roles)[2:]}
    assert found.scheduler == folder / "scheduler" / "scheduler_config.json"
    found.check()

    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for again in (weights.inspect_checkpoint(cached), weights.inspect_checkpoint(f"somebody/{name}")):
        assert (again.path, again.variant, places(again)) == (folder, variant, roles)
    assert weights.inspect_checkpoint(folder / "transformer").variant == variant
    for lost in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                 "text_encoder/model.fp16.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json"):
        (folder / lost).unlink()
    (folder / "tokenizer").rmdir()
    found = weights.inspect_checkpoint(folder)
    assert places(found)["autoencoder"] == "ae.safetensors"
    assert found.missing.keys() == {"clip_l", "tokenizer of clip_l"}
    message = (rf"{folder.name} is no whole pipeline, it lacks clip_l \(text_encoder/ .*\), tokenizer of clip_l "
               r"\(tokenizer/\): put them .*, or give .*; .* is missing: an interrupted download, run it again")
    with pytest.raises(FileNotFoundError, match=message):
        found.check()


def test_text_encoders_of_unusual_width_are_told_by_their_folders(described):
    found, _ = described("tiny-sd3")
    assert places(found) == {"transformer": "transformer", "autoencoder": "vae", "clip_l": "text_encoder",
                             "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
    assert (found.family, found.missing) == ("sd3", {}) and found.told.endswith("sizes of its own")


def test_a_folder_of_original_files(described, tmp_path):
    sparse_file(tmp_path / "flux1-schnell.safetensors", shapes_of("bfl/flux1-schnell"))
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"))
    sparse_file(tmp_path / "lora.safetensors", {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 8)})
    sparse_file(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors", shapes_of("text/t5xxl"))
    (tmp_path / "tokenizer_2").mkdir()
    (tmp_path / "tokenizer_2" / "tokenizer.json").write_text("{}")
    found, _ = described(tmp_path)
    assert places(found) == {"transformer": "flux1-schnell.safetensors", "autoencoder": "ae.safetensors",
                             "t5": "text_encoders/t5xxl_fp16.safetensors"}
    assert found.tokenizers.keys() == {"t5"} and found.missing.keys() == {"clip_l", "tokenizer of clip_l"}
    ((place, error),) = found.beside.items()
    assert place == tmp_path / "lora.safetensors"
    assert str(error) == f"{place} is a LoRA, a small change to a model: give another file"
    assert places(weights.inspect_checkpoint(tmp_path / "flux1-schnell.safetensors")) == places(found)


def test_of_several_files_the_transformer_s_own_autoencoder_counts(described, tmp_path):
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"))
    sparse_file(tmp_path / "sd3_medium.safetensors", shapes_of("sai/sd3_medium"))
    sparse_file(tmp_path / "clips.safetensors", text_encoders(["clip_l", "clip_g"]))
    found, _ = described(tmp_path)
    assert places(found) == {"transformer": "sd3_medium.safetensors", "autoencoder": "sd3_medium.safetensors",
                             "clip_l": "clips.safetensors", "clip_g": "clips.safetensors"}
    assert found.beside == {tmp_path / "ae.safetensors": "holds autoencoder"}


def test_of_several_transformers_none_is_taken(tmp_path):
    one = sparse_file(tmp_path / "sd3_medium.safetensors", shapes_of("sai/sd3_medium"))
    sparse_file(tmp_path / "flux1-schnell.safetensors", shapes_of("bfl/flux1-schnell"))
    sparse_file(tmp_path / "ae.safetensors", shapes_of("bfl/ae"))
    with pytest.raises(CheckpointError, match=r"several transformers \(flux1-schnell\.safetensors: \*, sd3_medium\.s"):
        weights.inspect_checkpoint(tmp_path)
    assert weights.inspect_checkpoint(one).family == "sd3"


# ---- what is no supported model


@pytest.mark.parametrize(("tensors", "message"), [
    (shapes_of("diffusers/sd3.vae"), "scaling and shift .* not known: give a config"),
    (shapes_of("bfl/flux1-dev") | {"img_in.weight": (3072, 384)}, "reads 384 numbers a patch and returns 64, .*Fill"),
    ({n: s for n, s in shapes_of("bfl/flux1-dev").items() if n != "img_in.weight"}, "img_in.weight is missing"),
    ({n: s for n, s in shapes_of("bfl/flux1-dev").items() if "query" not in n}, "heads are 64 wide.*: give config="),
])
def test_a_network_that_cannot_be_loaded_is_shown_with_the_reason(call, tmp_path, tensors, message):
    file = sparse_file(tmp_path / "wrong.safetensors", tensors)
    code, printed, complaint = call(file)
    assert (code, complaint) == (2, "") and re.search(rf"\nproblem +\w+: .*wrong\.safetensors.*{message}", printed)
    (part,) = weights.inspect_checkpoint(file).parts.values()
    with pytest.raises(CheckpointError, match=rf"wrong\.safetensors.*{message}"):
        weights.open_part(part)


@pytest.mark.parametrize(("tensors", "first"), [({"something.else": (2,)}, "something.else"), ({}, "none at all")])
def test_files_of_no_network_say_so(tmp_path, tensors, first):
    file = sparse_file(tmp_path / "wrong.safetensors", tensors)
    message = (r"wrong\.safetensors is no part of FLUX\.1, FLUX\.2 or SD3 .* "
               rf"\(its first tensor: {first}\): give another file")
    with pytest.raises(CheckpointError, match=message):
        weights.inspect_checkpoint(file)


def test_folders_that_cannot_be_right_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file"):
        weights.inspect_checkpoint(tmp_path)
    flux = sparse_hub_folder(tmp_path / "flux", "flux", "diffusers/flux1-schnell.transformer")
    shard = "diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=f"{shard} is one of 3 shards: give the folder of all"):
        weights.inspect_checkpoint(flux / "transformer" / shard)
    (flux / "transformer" / shard).unlink()
    found = weights.inspect_checkpoint(flux)
    assert "transformer" not in found.parts
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing"):
        found.check()
    (flux / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(CheckpointError, match="flux is a StableDiffusionXLPipeline, not FLUX.1, FLUX.2 or SD3: give a"):
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


def test_nan_and_infinity_are_found_wherever_they_are(call, stored):
    path, change = stored
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
    names = ("0.x_block.attn.proj.bias", "0.x_block.attn.proj.weight", "0.x_block.mlp.fc1.bias",
             "1.x_block.attn.proj.scale_weight")
    code, printed, _ = call(path, "--check", "--json")
    found = json.loads(printed)["parts"]["transformer"]["NaN or inf"]
    assert code == 1 and sorted(found.split(", ")) == [f"{DIT}joint_blocks.{name}" for name in names]


# ---- the program


def test_the_program_prints_what_is_there_and_what_is_missing(call, tmp_path):
    file = sparse_file(tmp_path / "flux1-dev.safetensors", shapes_of("bfl/flux1-dev"))
    code, printed, complaint = call(file)
    assert (code, complaint) == (0, "")
    assert "flux1-dev.safetensors: flux1-dev (by its name)\n" in printed
    row = next(line for line in printed.splitlines() if line.startswith("transformer"))
    assert re.split(r"\s{2,}", row) == ["transformer", file.name, "original FLUX.1", "BF16", "11,901.4 M", "23.80 GB"]
    assert re.search(r"missing +autoencoder: vae/ or ae\.safetensors\n", printed)
    assert re.search(r"missing +t5: text_encoder_2/ or t5xxl_fp16\.safetensors\n", printed)
    assert max(map(len, printed.splitlines()[1:])) <= 100
    code, printed, _ = call(file, "--json")
    found = json.loads(printed)
    assert found["variant"] == "flux1-dev" and found["parts"]["transformer"]["parameters"] == 11_901_408_320
    assert found["missing"].keys() == FLUX_LACKS


def test_exit_codes(call, stored, tmp_path):
    path, change = stored
    code, printed, complaint = call(path, "--check")
    assert code == 0 and re.search(r"NaN or inf +in no tensor\n", printed) and "x.safetensors" in complaint  # a bar
    change(joint_blocks__0__x_block__attn__proj__bias=torch.full((128,), float("nan")))
    assert call(path)[0] == 0
    code, printed, _ = call(path, "--check")
    assert code == 1
    assert re.search(rf"NaN or inf +transformer: {DIT}joint_blocks\.0\.x_block\.attn\.proj\.bias\n", printed)
    path.write_bytes(path.read_bytes()[:-5])
    for wrong in (path, tmp_path / "nowhere", "nobody/nothing"):
        code, printed, complaint = call(wrong)
        assert (code, printed) == (2, "") and complaint.startswith("error: ") and complaint.count("\n") == 1


def test_help_teaches(call, capsys):
    with pytest.raises(SystemExit, match="0"):
        call("--help")
    printed = capsys.readouterr().out
    assert "python -m weights flux1-dev.safetensors" in printed and "--check" in printed and "exit codes" in printed
