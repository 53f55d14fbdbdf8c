"""`python -m weights` as a program: what it prints and returns, and that it and the loaders judge alike."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, SD3, VAE, randomize
from sparse import shapes_of, sparse_file

import weights
from mmdit import Autoencoder, ClipTextEncoder, MMDiT
from weights import __main__ as program

ROOT = Path(__file__).parents[2]


def run(monkeypatch, capsys, *arguments):
    """Exit code, what was printed, what was complained."""
    monkeypatch.setattr(sys, "argv", ["weights", *map(str, arguments)])
    code = program.main()
    return code, *capsys.readouterr()


def said(error, file):
    """An error in one line, with the path as the table has it."""
    return " ".join(str(error).split()).replace(f"{file.parent}/", "")


@pytest.fixture
def file(tmp_path):
    weights.save_transformer(randomize(MMDiT(SD3)), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_the_table_and_the_json_say_the_same(file, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, file)
    assert code == 0 and "original SD3" in out and "missing     clip_g: text_encoder_2/ or clip_g.safetensors" in out
    code, text, _ = run(monkeypatch, capsys, file, "--json")
    about = json.loads(text)
    assert code == 0 and about["parts"]["transformer"]["layout"] == "original SD3" and about["family"] == "sd3"
    parameters = sum(p.numel() for p in MMDiT(SD3).parameters())
    assert about["parts"]["transformer"]["parameters"] == parameters
    assert f"{parameters / 1e6:,.1f} M" in out


def test_a_damaged_part_of_a_folder_is_a_problem_and_a_file_beside_is_none(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(weights.BUNDLED["tiny-turbo"], tmp_path / "x")
    (folder / "broken.safetensors").write_bytes(b"\x99" * 50)
    assert run(monkeypatch, capsys, folder)[0] == 0
    file = next((folder / "transformer").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert run(monkeypatch, capsys, folder)[0] == 2
    file.write_bytes(whole)
    shutil.rmtree(folder / "text_encoder_3")  # may be left out
    assert run(monkeypatch, capsys, folder)[0] == 0
    shutil.rmtree(folder / "vae")
    assert run(monkeypatch, capsys, folder)[0] == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_reads_the_numbers(file, monkeypatch, capsys, bad):
    code, out, _ = run(monkeypatch, capsys, file, "--check")
    assert code == 0 and out.rstrip().endswith("NaN or inf  in no tensor")
    tensors, name = load_file(file), "model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, file)
    code, out, _ = run(monkeypatch, capsys, file, "--check")
    assert code == 1 and f"NaN or inf  transformer: {name}" in out


@pytest.mark.parametrize("change", ["cut", "other sizes", "no tensor", "one more", "int8", "LoRA"])
def test_what_the_loader_refuses_is_refused_in_the_same_sentence(file, monkeypatch, capsys, change):
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("x_block.mlp.fc1.weight"))
    changed = {"other sizes": {**tensors, name: torch.ones(7, 5)}, "one more": {**tensors, name + "s": torch.ones(2)},
               "no tensor": {n: t for n, t in tensors.items() if n != name},
               "int8": {**tensors, name: torch.zeros(tensors[name].shape, dtype=torch.int8)},
               "LoRA": {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}}
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-99])
    else:
        save_file(changed[change], file)
    with pytest.raises(weights.CheckpointError) as refused:
        weights.load_transformer(file)
    code, out, complaint = run(monkeypatch, capsys, file)
    assert code == 2 and said(refused.value, file) in out + complaint.replace(f"{file.parent}/", "")


@pytest.mark.parametrize("make", [
    lambda folder: weights.save_autoencoder(Autoencoder(VAE), folder / "x.safetensors"),
    lambda folder: weights.save_text_encoder(ClipTextEncoder(CLIP), folder / "x.safetensors"),
    lambda folder: sparse_file(folder / "x.safetensors", shapes_of("bfl/ae")),
    lambda folder: sparse_file(folder / "x.safetensors", shapes_of("text/clip_l")),
    lambda folder: sparse_file(folder / "x.safetensors", shapes_of("text/t5xxl")),
    lambda folder: sparse_file(folder / "x.safetensors", shapes_of("diffusers/sd3.vae")),
    lambda folder: sparse_file(folder / "x.safetensors", {"something.else": (2,)}),
])
def test_it_and_the_loaders_agree(tmp_path, monkeypatch, capsys, make):
    make(tmp_path)
    answers = []
    for load in (weights.load_transformer, weights.load_autoencoder, weights.load_text_encoder):
        try:
            answers.append(load(tmp_path / "x.safetensors"))
        except weights.CheckpointError as error:
            answers.append(str(error))
    code, out, complaint = run(monkeypatch, capsys, tmp_path / "x.safetensors")
    loaded = [answer for answer in answers if not isinstance(answer, str)]
    assert (code == 0) == bool(loaded)
    if not loaded:
        said_by_it = out + complaint.replace(f"{tmp_path}/", "")
        assert any(said(answer, tmp_path / "x.safetensors") in said_by_it for answer in answers)


def test_a_closed_pipe_and_a_narrow_encoding_end_quietly(file):
    command = f"{sys.executable} -m weights {file}"
    for line, code in [(f"{command} --json | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}", (0, 141)),
                       (f"PYTHONIOENCODING=ascii {command}", (0,))]:
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in code and "Traceback" not in done.stderr
