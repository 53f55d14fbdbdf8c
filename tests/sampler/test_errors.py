"""What goes wrong while it runs: networks that return NaN, too little memory, Ctrl-C, closed pipes, pictures it cannot
edit. Each ends in a sentence, and what was finished is kept."""

import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import flux, pixels, saved

from mmdit import MMDiT
from repulsion import Repulsion
from sampler import Pipeline, program
from sampler.options import exit_code, parser, sentence
from sampler.parts import Part

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "sampler"]
QUICK = ("a star", "--images", "2", "--steps", "2", "--out", "here")


def process(*arguments, place, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.Popen([*PROGRAM, *arguments], cwd=place, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


# ---- NaN and flat pictures

NETWORKS = {"the text encoder CLIP-L": lambda p: p.text.clips[0][1].module,
            "the text encoder CLIP-G": lambda p: p.text.clips[1][1].module,
            "the text encoder T5": lambda p: p.text.t5[1].module, "the transformer": lambda p: p.transformer,
            "the autoencoder": lambda p: p.autoencoder}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", NETWORKS)
def test_nan_names_the_network_and_what_to_try(network, value, monkeypatch, call, tmp_path, capsys):
    broken = Pipeline.load("tiny-sd3")
    for tensor in NETWORKS[network](broken).parameters():
        tensor.view(-1)[0] = value
    monkeypatch.setattr(program.Pipeline, "load", classmethod(lambda cls, *_, **__: broken))
    assert call(*QUICK) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {network} returned NaN or infinity: try another dtype" in error
    assert "python -m weights FILE --check" in error and list(tmp_path.iterdir()) == []


def test_nan_where_samples_repel_names_the_transformer():
    broken = Pipeline.load("tiny-sd3")
    broken.transformer.image_in.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the transformer overflowed before the repulsion"):
        broken("a star", 2, steps=1, repulsion=Repulsion(strength=1.0))


@pytest.mark.parametrize("color", [0.0, 3.0])
def test_a_flat_picture_is_an_error(color):
    broken = Pipeline.load("tiny-sd3")
    *_, weight, bias = broken.autoencoder.decoder.parameters()
    weight.zero_(), bias.fill_(color)
    with pytest.raises(ValueError, match="the autoencoder returned a picture of a single color: try another dtype"):
        broken("a star", 1, steps=1)


# ---- a finished batch


def check_base_is_kept(folder, reason):
    assert {file.name for file in folder.iterdir()} == {"base-00.png", "base-01.png", "base.png", "summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert reason in summary["stopped"]["repelled"] and set(summary["batches"]) == {"base"}
    expected = Pipeline.load("tiny-sd3")("a star", 2, steps=summary["steps"])
    found = [Image.open(folder / f"base-{i:02d}.png") for i in range(2)]
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1  # float32, another process


def test_a_finished_batch_is_kept_when_the_next_fails(call, tmp_path, capsys):
    assert call(*QUICK, "--scale", "1e300") == 2
    printed = capsys.readouterr()
    assert "written to here: the finished batch alone, base" in printed.out
    assert printed.err.splitlines()[-1].startswith("error: the push exceeds the range of torch.float32")
    check_base_is_kept(tmp_path / "here", "the push exceeds the range")


def test_a_finished_batch_is_kept_when_the_next_cannot_be_decoded(call, pipeline, tmp_path, monkeypatch, capsys):
    decode, decoded = pipeline.autoencoder.decode, []

    def flat_from_the_third_on(latent):
        decoded.append(latent)
        return decode(latent) if len(decoded) <= 2 else torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(pipeline.autoencoder, "decode", flat_from_the_third_on)
    assert call(*QUICK) == 2 and "a single color" in capsys.readouterr().err
    check_base_is_kept(tmp_path / "here", "a single color")


@pytest.mark.parametrize("offload", [(), ("--offload", "parts")])
def test_a_finished_batch_is_kept_when_the_next_is_interrupted(offload, tmp_path):
    run = process("a star", "--images", "2", "--steps", "40", "--out", "here", *offload, place=tmp_path,
                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    said = b""
    while b"repelled:" not in said and run.poll() is None:
        said += run.stderr.read1()
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130 and b"Traceback" not in err
    assert b"interrupted: the finished batch was written" in err and b"written to here: the finished batch" in out
    check_base_is_kept(tmp_path / "here", "KeyboardInterrupt")


def test_interrupted_in_the_first_batch_nothing_is_written(call, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MMDiT, "forward", interrupt)
    assert call(*QUICK) == 130 and "interrupted: nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- one network at a time, and each once


@pytest.mark.parametrize("batches", [(), ("--no-compare",)])
def test_offload_in_parts_reads_each_network_once_for_both_batches(batches, monkeypatch, call, tmp_path, pipeline):
    read, init = [], Part.__init__

    def counted(self, load, free=False):
        def noted():
            assert all(network() is None for _, network in read), "another network is still in memory"
            network = load()
            read.append((type(network).__name__, weakref.ref(network)))
            return network

        init(self, noted, free)

    monkeypatch.setattr(Part, "__init__", counted)
    offloaded = Pipeline.load("tiny-sd3", offload="parts")
    monkeypatch.setattr(program.Pipeline, "load", classmethod(lambda cls, *_, **__: offloaded))
    assert call(*QUICK, *batches) == 0
    names = [name for name, _ in read]
    assert names == ["ClipTextEncoder", "ClipTextEncoder", "T5Encoder", "MMDiT", "Autoencoder"]
    repelled = pipeline("a star", 2, steps=2, repulsion=pipeline.defaults.repulsion)
    found = [Image.open(tmp_path / "here" / f"repelled-{i:02d}.png") for i in range(2)]
    assert (pixels(found) == pixels(repelled)).all()


# ---- memory and devices


def cpu_allocation():
    torch.empty(1 << 50)


def numpy_allocation():
    np.ones(1 << 50)


@pytest.mark.parametrize("allocate,amount", [(cpu_allocation, "4194304.00 GiB"), (numpy_allocation, "8.00 PiB")])
def test_out_of_memory_is_a_sentence(allocate, amount, call, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda latent: allocate())
    assert call(*QUICK) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (f"error: out of memory at {amount}: try fewer or smaller pictures, or, where this program "
                     "has them, --dtype bfloat16 and --offload parts or blocks")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error,said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of"),
     "out of memory at 20.00 GiB: try fewer"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB). Tried to allocate 1.50 GB on private pool."),
     "out of memory at 1.50 GB: try"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to "
                  "allocate 68719476736 bytes."), "out of memory at 64.00 GiB: try"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory: try"),
    (MemoryError(), "out of memory: try"),
    (TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."),
     "the device mps cannot compute this (Cannot convert a MPS Tensor to float64 dtype"),
    (ValueError("4,719,576 of 9,439,152 bytes"), "4,719,576 of 9,439,152 bytes"),
])  # fmt: skip
def test_errors_of_torch_become_sentences(error, said):
    assert sentence(error).startswith(said)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("no len()")])
def test_mistakes_of_the_program_keep_their_traceback(error):
    def wrong(_):
        raise error

    with pytest.raises(type(error), match=str(error).replace("(", r"\(").replace(")", r"\)")):
        exit_code(wrong, parser_of_nothing())


def parser_of_nothing():
    found = parser()
    found.parse_args = lambda: None
    return found


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:99", "abacus"])
def test_devices_that_are_not_there_are_a_sentence(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sampler", *QUICK, "--device", device])
    assert program and exit_code(program.run, parser()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: device '{device}' cannot be used here: ") and error.count("\n") == 1
    assert len(error) < 300 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name,size,message", [
    ("tiny-sd3", {"height": 272}, "height 272: this checkpoint's position table ends at 16 × 16 patches, 256 pixels"),
    ("tiny-sd3", {"width": 8 * 10**30}, "position table ends at 16 × 16"),
    ("tiny-flux", {"height": 8 * 10**9}, r"height 8000000000 and width 128: .* take [\d,]+ GiB, more than this"),
    ("tiny-flux", {"height": 8 * 10**400}, "more than this machine has"),
    ("tiny-sd3", {"images": 10**10}, "images 10000000000, height 128 and width 128: .*ask for fewer or smaller"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused_before_anything_is_read(name, size, message):
    fresh = Pipeline.load(name)
    with pytest.raises(ValueError, match=message):
        fresh("a star", **size)
    assert all(part._module is None for part in (*fresh.parts.values(), fresh.text.t5[1]))


# ---- the terminal


def test_help_leaves_torch_out():
    look = ("import runpy, sys\nsys.argv = ['sampler', '--help']\n"
            "try:\n    runpy.run_module('sampler', run_name='__main__')\n"
            "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'sampler.options' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False True"


@pytest.mark.parametrize("arguments", [("--help",), (*QUICK, "--no-compare")])
def test_a_closed_pipe_is_no_traceback_and_the_pictures_are_there(arguments, tmp_path):
    run = process(*arguments, place=tmp_path)
    run.stdout.close()  # before it prints: it has just started
    err = run.stderr.read()
    assert b"Error" not in err and b"ignored" not in err
    assert run.wait() in (141, 0 if "--help" in arguments else 141)  # argparse ignores that the help was not written
    if "--out" in arguments:
        assert {file.name for file in (tmp_path / "here").iterdir()} >= {"repelled-00.png", "summary.json"}


def test_an_encoding_without_eta_prints_a_question_mark(tmp_path):
    ascii_ = {"PYTHONIOENCODING": "ascii"}
    out, err = process("--help", place=tmp_path, env=ascii_).communicate()
    assert b"?, instead of a strength" in out and not err
    run = process("an η", *QUICK[1:], "--no-compare", place=tmp_path, env=ascii_)
    out, err = run.communicate()
    assert run.returncode == 0 and b"unknown word '?' in 'an ?'" in err and b"written to here" in out
    assert json.loads((tmp_path / "here/summary.json").read_text(encoding="utf-8"))["prompt"] == "an η"


# ---- what is likely not meant


def test_a_single_picture_repels_nothing_is_said(call, capsys):
    assert call("a star", "--images", "1", "--steps", "1") == 0
    assert "note: a single picture repels nothing: ask for --images 2 or more" in capsys.readouterr().err
    for other in (("--images", "2"), ("--images", "1", "--method", "cads")):
        assert call("a star", "--steps", "1", *other) == 0
        assert "note:" not in capsys.readouterr().err


def test_another_size_than_was_learned_is_said(call, capsys):
    assert call("a star", "--images", "2", "--steps", "1", "--no-compare", "--width", "64") == 0
    assert "note: this checkpoint learned pictures of 128 × 128 pixels alone" in capsys.readouterr().err


@pytest.mark.parametrize("prompt,said", [
    ("a cat", "unknown word 'cat' in 'a cat'; known words: circle square"),
    ("a huge star", "unknown word 'huge' in 'a huge star'; known words: circle"),
    ("a circle in a row", "'row' does not fit 1 thing(s)"),
])  # fmt: skip
def test_a_prompt_outside_the_language_is_painted_and_said_before(prompt, said, call, capsys, tmp_path):
    assert call(prompt, "--images", "2", "--steps", "1", "--no-compare", "--out", "here") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("note: outside the language of this checkpoint: ") and said in first
    assert json.loads((tmp_path / "here/summary.json").read_text())["batches"]["repelled"]["adherence"] is None


# ---- pictures to edit


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """One small random FLUX.1 under two names: as -dev, which edits no pictures, and as -Kontext-dev."""
    place = tmp_path_factory.mktemp("models")
    _, dev = saved(flux(levels=3, blocks=1), place / "FLUX.1-dev")
    (place / "FLUX.1-dev").rename(place / "FLUX.1-Kontext-dev")
    return dev, Pipeline.load(place / "FLUX.1-Kontext-dev")


def test_a_picture_for_a_model_that_edits_none_is_refused(editors, pipeline):
    for other in (editors[0], pipeline, Pipeline.load("tiny-flux"), Pipeline.load("tiny-turbo")):
        with pytest.raises(ValueError, match="image: this checkpoint edits no pictures: leave it out, or load"):
            other("a star", 1, steps=1, image=Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pictures_without_a_known_range_are_refused(editors, mode, tmp_path):
    Image.new(mode, (64, 64)).save(tmp_path / "photo.tiff")
    with pytest.raises(ValueError, match=f"image has mode {mode}, 32 bits a pixel, whose range of values is unknown"):
        editors[1]("a star", 1, steps=1, image=program.open_picture(tmp_path / "photo.tiff"))
