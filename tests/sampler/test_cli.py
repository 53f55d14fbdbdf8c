"""The program as a user calls it: what it writes, what it prints, and how wrong calls end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxKontextPipeline
from PIL import Image
from small_flux2 import klein
from small_pipelines import flux, saved

from repulsion import Repulsion
from sampler import options, output, program
from weights import BUNDLED

PICTURE = Path(__file__).parents[2] / "docs" / "samples.png"


def test_it_writes_both_batches_and_what_is_in_them(call, tmp_path, capsys):
    assert call("a circle", "--images", "2", "--steps", "3", "--seed", "7", "--scale", "1e5") == 0
    folder = tmp_path / "outputs" / "a-circle"
    names = {f"{batch}{part}.png" for batch in ("base", "repelled") for part in ("", "-00", "-01")}
    assert {file.name for file in folder.iterdir()} == names | {"compare.png", "summary.json"}

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["prompt"] == "a circle" and summary["seed"] == 7 and summary["steps"] == 3
    assert summary["guidance"] == 6.0 and summary["repulsion"]["scale"] == 1e5
    for batch in summary["batches"].values():
        assert 1 <= batch["vendi"] <= 2 and 0 <= batch["adherence"] <= 1 and batch["seconds"] > 0
        assert all(sum(counts.values()) <= 6 for counts in batch["attributes"].values())

    single = Image.open(folder / "repelled-01.png")
    assert single.size == (128, 128)
    assert single.text["prompt"] == "a circle" and single.text["seed"] == "7" and single.text["index"] == "1"
    assert json.loads(single.text["repulsion"])["scale"] == 1e5
    assert json.loads(Image.open(folder / "base-00.png").text["repulsion"]) is None
    printed = capsys.readouterr().out
    assert "Vendi score (1 to 2)" in printed and "adherence" in printed and str(folder.relative_to(tmp_path)) in printed


def test_the_grid_holds_the_single_pictures(call, tmp_path):
    call("a star", "--images", "3", "--steps", "2", "--out", "here")
    sheet, single = Image.open(tmp_path / "here/base.png"), Image.open(tmp_path / "here/base-02.png")
    x = output.GAP + 2 * (128 + output.GAP)
    cut = sheet.crop((x, output.GAP, x + 128, output.GAP + 128))
    assert cut.tobytes() == single.resize((128, 128), Image.Resampling.BICUBIC).tobytes()


def test_existing_output_is_kept_unless_told_otherwise(call, tmp_path, capsys):
    quick = ("a star", "--images", "1", "--steps", "1")
    assert call(*quick, "--out", "here") == 0
    before = (tmp_path / "here/summary.json").read_bytes()
    assert call(*quick, "--out", "here", "--seed", "1") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "here/summary.json").read_bytes() == before
    assert call(*quick, "--out", "here", "--seed", "1", "--overwrite") == 0
    assert json.loads((tmp_path / "here/summary.json").read_text())["seed"] == 1
    assert call(*quick) == 0 and call(*quick) == 0
    assert {f.name for f in (tmp_path / "outputs").iterdir()} == {"a-star", "a-star-2"}


def test_no_compare_makes_the_repelled_batch_alone(call, tmp_path):
    assert call("a star", "--images", "1", "--steps", "1", "--no-compare", "--out", "here") == 0
    assert {f.name for f in (tmp_path / "here").iterdir()} == {"repelled.png", "repelled-00.png", "summary.json"}


def test_a_picture_is_edited_and_the_summary_says_which(call, tmp_path):
    theirs, _ = saved(flux(FluxKontextPipeline, levels=3, blocks=1), tmp_path / "Small-Kontext")
    sampling = {"steps": 2, "guidance": 2.5, "height": 64, "width": 64, "edits": True}
    (tmp_path / "Small-Kontext/sampling.json").write_text(json.dumps(sampling))
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).save(tmp_path / "photo.png")
    assert call("a star", "--model", "Small-Kontext", "--image", "photo.png", "--images", "2", "--scale", "1e3",
                "--negative", "a ring", "--true-guidance", "2", "--out", "here") == 0
    summary = json.loads((tmp_path / "here/summary.json").read_text())
    assert (summary["image"], summary["width"], summary["height"]) == (["photo.png"], 72, 48)  # 1248 × 832, a sixteenth
    assert (summary["true_guidance"], summary["negative_prompt"]) == (2.0, "a ring")
    single = Image.open(tmp_path / "here/repelled-01.png")
    assert single.size == (72, 48) and single.text["image"] == '["photo.png"]'


def test_flux2_edits_several_pictures_and_repels_down_to_a_noise_level(call, tmp_path):
    saved(klein(), tmp_path / "small-klein")
    for name, size in (("one.png", (80, 64)), ("two.png", (64, 100))):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).save(tmp_path / name)
    assert call("a star", "--model", "small-klein", "--image", "one.png", "two.png", "--images", "2", "--repel-until",
                "0.8", "--out", "here") == 0
    summary = json.loads((tmp_path / "here/summary.json").read_text())
    assert (summary["image"], summary["width"], summary["height"]) == (["one.png", "two.png"], 80, 64)
    assert (summary["repulsion"]["until"], summary["repulsion"]["steps"], summary["steps"]) == (0.8, 1, 4)
    assert call("a star", "--model", "small-klein", "--repel-steps", "3", "--images", "2", "--no-compare", "--height",
                "64", "--width", "64", "--out", "there") == 0
    repulsion = json.loads((tmp_path / "there/summary.json").read_text())["repulsion"]
    assert (repulsion["until"], repulsion["steps"]) == (None, 3)
    assert call("a star", "--repel-steps", "3", "--repel-until", "0.8", "--out", "wrong") == 2


def test_skipped_layers_reach_the_pictures_and_the_summary(call, tmp_path):
    quick = ("a star", "--images", "1", "--steps", "8", "--no-compare")
    for out, skip in (("plain", ()), ("skip", ("--skip-layers", "1-2,4", "--skip-scale", "3"))):
        assert call(*quick, "--out", out, *skip) == 0
    summary = json.loads((tmp_path / "skip/summary.json").read_text())
    assert summary["skip_layer_guidance"] == {"layers": [1, 2, 4], "scale": 3.0, "start": 0.01, "stop": 0.2}
    assert Image.open(tmp_path / "plain/repelled.png").tobytes() != Image.open(tmp_path / "skip/repelled.png").tobytes()


def test_ctrl_c_leaves_nothing_half_written(call, tmp_path, monkeypatch, capsys):
    save, saved = output.save_png, []

    def interrupted(picture, file, about):
        saved.append(file)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(picture, file, about)

    monkeypatch.setattr(output, "save_png", interrupted)
    assert call("a star", "--images", "2", "--steps", "1", "--out", "here") == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(saved) == 3 and list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_settings():
    arguments = ["p", "--iterations", "4", "--repel-steps", "5", "--blocks", "0-2,7", "--branches", "conditional"]
    for name, other in (("strength", "scale"), ("scale", "strength")):
        asked = options.parser().parse_args([*arguments, f"--{name}", "3"])
        for default in (None, Repulsion(**{other: 7.0})):  # one takes the place of the other
            found = program.settings(asked, default)
            assert (getattr(found, name), getattr(found, other)) == (3, None)
            assert (found.iterations, found.steps, found.blocks, found.branches) == (4, 5, (0, 1, 2, 7), "conditional")


def test_a_strength_is_one_gradient_step_unless_more_are_asked_for():
    published, parse = Repulsion(scale=5e8, iterations=50), options.parser().parse_args
    assert program.settings(parse(["p", "--strength", "0.5"]), published) == Repulsion(strength=0.5)
    assert program.settings(parse(["p", "--strength", "0.5", "--iterations", "9"]), published).iterations == 9
    assert program.settings(parse(["p", "--scale", "1e8"]), published) == Repulsion(scale=1e8, iterations=50)


def test_without_a_default_a_strength_is_asked_for():
    with pytest.raises(ValueError, match="no default repulsion: say --strength, for example 0.5"):
        program.settings(options.parser().parse_args(["p"]), None)


@pytest.mark.parametrize("arguments,message", [
    (["a circle", "--model", "tiny-sd9"], "tiny-sd9 does not exist"),
    (["a circle", "--width", "60"], "width 60 is no multiple of 16: the nearest that works is 64"),
    (["a circle", "--images", "0"], "images must be at least 1"),
    (["a circle", "--steps", "0"], "steps must be at least 1"),
    (["a circle", "--scale", "-1"], "repulsion scale must be a finite number, 0 or more, got -1.0"),
    (["a circle", "--scale", "nan"], "repulsion scale must be"),
    (["a circle", "--iterations", "0"], "iterations must be at least 1"),
    ([""], "the prompt is empty"),
    (["a red circle and " * 9], "tokens and this checkpoint reads 24"),
    (["a circle", "--negative", "x", "--guidance", "1"], "negative_prompt needs"),
    (["a circle", "--blocks", "5-8"], "repulsion in block 8, but this model's blocks end at 7"),
    (["a circle", "--model", str(BUNDLED["tiny-sd3"]), "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["a circle", "--image", "photo.png"], "--image photo.png is no picture that can be read ([Errno 2] No such file"),
    (["a circle", "--image", __file__], "test_cli.py is no picture that can be read"),
    (["a circle", "--image", str(PICTURE)], "image: this checkpoint edits no pictures"),
    (["a circle", "--true-guidance", "3"], "true_guidance is for distilled FLUX"),
    (["a circle", "--skip-scale", "3"], "--skip-scale needs --skip-layers"),
    (["a circle", "--repel-steps", "1", "--repel-until", "0.5"], "--repel-steps and --repel-until both say when"),
    (["a circle", "--skip-layers", "7-9"], "skips layer 9, but this model's dual-stream blocks end at 7"),
])  # fmt: skip
def test_wrong_calls_end_in_one_line_and_write_nothing(call, tmp_path, capsys, arguments, message):
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["a circle", "--blocks", "0-"], ["a circle", "--blocks", "3-1"],
                                       ["a circle", "--branches", "both"],
                                       ["a circle", "--skip-layers", "middle"], []])
def test_arguments_that_cannot_be_parsed_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        options.parser().parse_args(arguments)
    assert stop.value.code == 2


def test_a_picture_that_was_cut_short_is_named(call, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:-2000])
    assert call("a circle", "--image", "cut.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --image cut.png is no picture that can be read") and error.count("\n") == 1


def test_as_a_process_a_truncated_file_is_one_line_and_exit_code_2(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text("{}")
    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    done = subprocess.run([sys.executable, "-m", "sampler", "a circle", "--model", str(folder), "--out",
                           str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "diffusion_pytorch_model.safetensors" in done.stderr and not (tmp_path / "out").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        options.parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("examples:", "--scale", "--repel-steps", "entropy", "outputs/<prompt>"):
        assert word in text
