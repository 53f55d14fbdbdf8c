"""Pipelines as people have them: one part replaced, other files in the folder, other names, settings overridden."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import flux, pixels, saved

import weights
from sampler import Pipeline

CALL = {"prompt": "a red circle", "images": 2, "steps": 2}


@pytest.fixture
def copy(tmp_path):
    """A bundled checkpoint as a folder that is nobody's."""
    def copied(name, *, settings=True):
        shutil.copytree(weights.BUNDLED[name], tmp_path / name)
        if not settings:
            (tmp_path / name / "sampling.json").unlink()
        return tmp_path / name

    return copied


def test_t5_alone_is_replaced_and_the_rest_stays(copy, tmp_path):
    folder = copy("tiny-sd3")
    (other,) = shutil.copytree(folder / "text_encoder_3", tmp_path / "t5").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(other).items()}, other, metadata={"format": "pt"})
    usual, replaced = Pipeline.load(folder), Pipeline.load(folder, text_encoders=[tmp_path / "t5"])
    changed = {name for name, where in replaced.files.items() if where != usual.files[name]}
    assert changed == {"t5"} and replaced.files["t5"] == str(tmp_path / "t5")
    (context, pooled), (old, old_pooled) = replaced.text("a star"), usual.text("a star")
    clips = usual.text.clips[0][0].length
    assert torch.equal(pooled, old_pooled) and torch.equal(context[:, :clips], old[:, :clips])
    assert not torch.equal(context[:, clips:], old[:, clips:])


def test_what_lies_beside_does_not_stop_a_run(copy):
    folder = copy("tiny-turbo")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, folder / "style.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x99" * 50)
    (folder / "old.ckpt").write_bytes(b"\x80\x02")
    found = weights.inspect_checkpoint(folder)
    assert {place.name for place in found.beside} == {"style.safetensors", "broken.safetensors", "old.ckpt"}
    assert (pixels(Pipeline.load(folder)(**CALL)) == pixels(Pipeline.load("tiny-turbo")(**CALL))).all()


def test_a_damaged_t5_is_not_left_out_in_silence(copy):
    folder = copy("tiny-sd3")
    file = next((folder / "text_encoder_3").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(weights.CheckpointError, match="an interrupted download.*or remove it to paint without T5"):
        Pipeline.load(folder)
    other = weights.BUNDLED["tiny-turbo"] / "text_encoder_3"
    assert Pipeline.load(folder, text_encoders=str(other)).files["t5"] == str(other)  # one path, not a list
    shutil.rmtree(file.parent)
    assert "t5" not in Pipeline.load(folder).files


def test_a_variant_of_another_family_is_refused(copy):
    with pytest.raises(weights.CheckpointError, match="of another family than variant flux1-dev: leave it out"):
        Pipeline.load(copy("tiny-turbo", settings=False), variant="flux1-dev")


def test_what_was_taken_from_where_is_said_and_written(copy, call, capsys, tmp_path):
    folder = copy("tiny-turbo", settings=False)
    size = ("--height", "64", "--width", "64", "--images", "2", "--steps", "1", "--strength", "1")
    assert call("a star", "--model", str(folder), "--out", "here", *size) == 0
    said = capsys.readouterr().err
    assert f"autoencoder: {folder}/vae" in said and "variant: sd3.5-large-turbo (by its name" in said
    files = json.loads((tmp_path / "here" / "summary.json").read_text())["files"]
    assert files["t5"] == str(folder / "text_encoder_3") and files["variant"].startswith("sd3.5-large-turbo")


def test_variant_and_shift_override(copy):
    folder = copy("tiny-turbo", settings=False)
    assert Pipeline.load(folder).defaults.steps == 4
    assert Pipeline.load(folder, variant="sd3.5-large").defaults.steps == 28
    for shift in (1.0, 5.0):
        levels = Pipeline.load(folder, shift=shift).sigmas(2, 64, 64).double()
        end = shift / 1000 / (1 + (shift - 1) / 1000)
        assert levels.tolist() == pytest.approx([1, shift * end / (1 + (shift - 1) * end), 0])
    with pytest.raises(ValueError, match="variant must be one of .*, got 'sd4'"):
        Pipeline.load(folder, variant="sd4")


def test_a_scheduler_that_is_not_honored_names_its_file(copy):
    folder = copy("tiny-flux")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"use_karras_sigmas": true}')
    message = r"scheduler_config\.json.*use_karras_sigmas True is not supported"
    with pytest.raises(weights.CheckpointError, match=message):
        Pipeline.load(folder)
    assert Pipeline.load(folder, shift=3.0).schedule.shift == 3.0  # what is given goes before the file


def test_a_dev_without_its_guidance_embedding_is_not_schnell(tmp_path):
    _, plain = saved(flux(guidance=False), tmp_path / "flux1-dev-de-distill")
    assert plain.files["variant"].startswith("flux1-dev-de-distill (by its name")
    shutil.copytree(tmp_path / "flux1-dev-de-distill", tmp_path / "flux1-schnell")
    schnell = Pipeline.load(tmp_path / "flux1-schnell")
    assert (plain.defaults.guidance, schnell.defaults.guidance) == (3.5, None)
    size = {"height": 32, "width": 32}
    guided = schnell(**CALL, **size, true_guidance=3.5, negative_prompt="")
    assert (pixels(plain(**CALL, **size)) == pixels(guided)).all()  # its guidance is classifier-free


def test_on_the_cpu_networks_stay_as_they_are_stored(copy):
    folder = copy("tiny-sd3", settings=False)
    pipeline = Pipeline.load(folder, device="cpu")
    dtypes = {name: {p.dtype for p in pipeline.parts[name].module.parameters()} for name in pipeline.parts}
    assert dtypes == {"transformer": {torch.bfloat16}, "autoencoder": {torch.float32}}
    assert {p.dtype for _, part in pipeline.text.clips for p in part.module.parameters()} == {torch.bfloat16}
    bundled = Pipeline.load("tiny-sd3", device="cpu")
    assert {p.dtype for p in bundled.transformer.parameters()} == {torch.float32}


def test_t5_is_never_float16(copy):
    folder = copy("tiny-sd3", settings=False)
    for part in ("transformer", "text_encoder", "text_encoder_3"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    pipeline = Pipeline.load(folder, device="cpu")
    assert next(pipeline.transformer.parameters()).dtype == torch.float16
    assert next(pipeline.text.clips[0][1].module.parameters()).dtype == torch.float16
    assert next(pipeline.text.t5[1].module.parameters()).dtype == torch.bfloat16
    assert pixels(pipeline("a star", 1, steps=2, height=64, width=64)).std() > 5
