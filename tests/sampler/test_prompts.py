"""`--prompts FILE`: a group a line, each finished once, whatever kills the program in between."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampler import options
from weights.load import Stored

ROOT = Path(__file__).parents[2]
QUICK = ("--model", "tiny-turbo", "--images", "2", "--steps", "1", "--no-compare")
PROMPTS = """a circle
{"prompt": "two red stars", "seed": 5, "images": 3, "strength": 1}

a square
a ring
{"prompt": "a blue ring", "steps": 2, "blocks": "0-1", "negative": null}
a green triangle
a circle"""
NAMES = ["00001-a-circle", "00002-two-red-stars", "00004-a-square", "00005-a-ring", "00006-a-blue-ring",
         "00007-a-green-triangle", "00008-a-circle"]  # fmt: skip


def written(folder):
    """The pixels of each picture and grid below a folder, by name."""
    return {str(file.relative_to(folder)): Image.open(file).tobytes() for file in sorted(folder.rglob("*.png"))}


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(line):
    return {**line, "batches": {name: {**found, "seconds": 0} for name, found in line["batches"].items()}}


@pytest.fixture
def prompts(call, tmp_path):
    """Paints the lines in this process; → the folder."""
    (tmp_path / "file.txt").write_text(PROMPTS, encoding="utf-8")

    def run(out, *more):
        assert call("--prompts", "file.txt", *QUICK, "--out", out, *more) == 0
        return tmp_path / out

    return run


def test_each_line_is_what_a_single_run_with_its_options_writes(call, prompts, tmp_path):
    out = prompts("many")
    found = lines(out)
    assert [line["folder"] for line in found] == NAMES
    assert sorted(path.name for path in out.iterdir()) == [*NAMES, "results.jsonl"]
    for line in found:
        summary = json.loads((out / line["folder"] / "summary.json").read_text(encoding="utf-8"))
        assert line == {"folder": line["folder"], **summary}

    given = ("--images", "3", "--seed", "5", "--strength", "1")
    assert call("two red stars", *QUICK, *given, "--out", "single") == 0
    assert written(tmp_path / "single") == written(out / "00002-two-red-stars")
    assert call("a blue ring", *QUICK, "--steps", "2", "--blocks", "0-1", "--out", "other") == 0
    assert written(tmp_path / "other") == written(out / "00006-a-blue-ring")


def test_killed_at_every_moment_nothing_is_lost_or_doubled(prompts, tmp_path):
    whole = prompts("whole")
    (expected := written(whole)) and (results := (whole / "results.jsonl").read_bytes().splitlines(keepends=True))

    # Every state that a kill can leave: the line cut at any byte, with the folder there; the folder half written.
    cut = prompts("cut")
    for keep in (0, 1, 40, len(results[3]) - 1):
        (cut / "results.jsonl").write_bytes(b"".join(results[:3]) + results[3][:keep])
        painted = (cut / NAMES[3] / "repelled-00.png").stat().st_mtime_ns
        prompts("cut")
        assert (cut / NAMES[3] / "repelled-00.png").stat().st_mtime_ns == painted  # not painted again
        assert sorted(line["folder"] for line in lines(cut)) == NAMES and len(lines(cut)) == 7
    half = cut / f".{NAMES[4]}.partial"
    (cut / NAMES[4]).rename(half)
    (half / "summary.json").unlink()
    (half / "repelled-01.png").write_bytes(b"\x89PNG")
    kept = [line for line in lines(cut) if line["folder"] != NAMES[4]]
    (cut / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    prompts("cut")
    assert written(cut) == expected and not half.exists()
    assert sorted(map(str, map(without_time, lines(cut)))) == sorted(map(str, map(without_time, lines(whole))))


def test_a_killed_process_is_gone_on_from(prompts, tmp_path):
    expected = written(prompts("whole"))
    command = [sys.executable, "-m", "sampler", "--prompts", "file.txt", *QUICK, "--out", "killed"]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=here, stderr=subprocess.PIPE) as process:
        while not (tmp_path / f"killed/{NAMES[2]}").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        process.kill()
    begun = {line["folder"] for line in lines(tmp_path / "killed")}
    assert begun < set(NAMES)
    before = {name: (tmp_path / "killed" / name).stat().st_ino for name in begun}
    out = prompts("killed")
    found = written(out)
    assert sorted(line["folder"] for line in lines(out)) == NAMES and found.keys() == expected.keys()
    for name, pixels in found.items():  # another process may sum in another order, on more threads
        ours, theirs = (np.frombuffer(x, dtype=np.uint8).astype(int) for x in (pixels, expected[name]))
        assert np.abs(ours - theirs).max() <= 2, name
    assert before == {name: (out / name).stat().st_ino for name in begun}


def test_when_memory_is_short_text_encoders_are_read_once_for_all_prompts(prompts, monkeypatch):
    expected, read, load = written(prompts("plain")), [], Stored.load
    monkeypatch.setattr(Stored, "load", lambda self, *args, **given: (
        read.append(self.part.role) or load(self, *args, **given)))
    assert written(prompts("offload", "--offload", "parts")) == expected
    assert [role for role in read if role in ("clip_l", "clip_g", "t5")] == ["clip_l", "clip_g", "t5"]
    assert read.count("transformer") == 7
    read.clear()
    assert written(prompts("blocks", "--offload", "blocks")) == expected
    assert read.count("transformer") == 1 and read.count("t5") == 1


@pytest.mark.parametrize("text,message", [
    ("a circle\n{broken", "file.txt, line 2: Expecting property name"),
    ('{"seed": 1}', 'file.txt, line 1: it has no "prompt" with a text'),
    ('{"prompt": "a star", "image_count": 2}', "line 1: 'image_count' is none of prompt, images, seed"),
    ('{"prompt": "a star", "seed": "x"}', "line 1: argument --seed: invalid int value: 'x'"),
    ('{"prompt": "a star", "seed": true}', "line 1: argument --seed: invalid int value: 'True'"),
    ('{"prompt": "a star", "strength": -1}', "line 1: repulsion strength must be a finite number"),
    ('{"prompt": "a star", "blocks": "40"}', "line 1: repulsion in block 40"),
    ('a star\n{"prompt": "a star", "height": 100}', "line 2: height 100 is no multiple of 16"),
    ('{"prompt": "a star", "steps": 0}', "line 1: steps must be at least 1"),
    ('{"prompt": "a star", "method": "interval"}', "line 1: IntervalGuidance needs guidance to limit"),
    ('{"prompt": "a star", "image": ["none.png"]}', "line 1: --image none.png is no picture"),
    ('{"prompt": "a star", "negative": "' + "a circle and " * 20 + '"}', "line 1: the prompt has"),
    ("a star\n" + "a circle and " * 20, "line 2: the prompt has"),
    ("\n \n", "file.txt holds no prompt: write one a line"),
    (b"\xff\xfe", "--prompts file.txt cannot be read"),
])  # fmt: skip
def test_a_wrong_line_is_named_before_anything_is_painted(call, tmp_path, capsys, text, message):
    (tmp_path / "file.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert call("--prompts", "file.txt", *QUICK, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_or_of_someone_else_is_left_alone(call, prompts, tmp_path, capsys):
    out = prompts("here")
    before, text = written(out), (out / "results.jsonl").read_bytes()
    for more in (("--steps", "2"), ("--seed", "3"), ("--strength", "9"), ("--dtype", "bfloat16"), ("--height", "32")):
        assert call("--prompts", "file.txt", *QUICK, "--out", "here", *more) == 2
        error = capsys.readouterr().err
        assert "was painted with" in error and more[0].strip("-") in error
        assert more[0] != "--strength" or "would be {'strength': 9.0}" in error  # no setting that is the same
    assert (written(out), (out / "results.jsonl").read_bytes()) == (before, text)
    (tmp_path / "there" / NAMES[0]).mkdir(parents=True)
    assert call("--prompts", "file.txt", *QUICK, "--out", "there") == 2
    assert "exists already" in capsys.readouterr().err
    assert call("--prompts", "file.txt", *QUICK, "--out", "here", "--overwrite") == 2


def test_options_of_a_line_take_the_place_of_those_of_the_command_line():
    command = options.parser().parse_args(["--prompts", "x", "--seed", "4", "--strength", "2", "--model", "m"])
    found = options.options_of({"prompt": "--seed", "seed": -1, "image": ["a.png", "b c.png"], "steps": None,
                                "skip_layers": [7, 8, 9], "blocks": [0, 1]}, command)
    assert (found.prompt, found.seed, found.strength, found.model) == ("--seed", -1, 2, "m")
    assert found.image == [Path("a.png"), Path("b c.png")] and found.steps is None
    assert (found.skip_layers, found.blocks) == ((7, 8, 9), (0, 1))  # as summary.json has them


@pytest.mark.parametrize("arguments", [["a star", "--prompts", "file"], []])
def test_a_prompt_or_a_file_of_prompts(arguments):
    with pytest.raises(SystemExit):
        options.parser().parse_args(arguments)
