"""The checker: its report on missing tensors, wrong shapes, NaN and infinity, and the exit codes of the program."""

import io
import sys
import zipfile
from dataclasses import replace
from itertools import groupby, product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from porting import Kit, compare, files, report
from porting import __main__ as program
from sampler import Pipeline, starting_noise


def said(kit, theirs):
    return report(compare(kit, theirs))


def test_the_kit_itself_passes(kit):
    assert "first deviation" not in said(kit, kit.tensors)
    assert f"{len(kit.tensors)} of {len(kit.tensors)} tensors pass, 0 deviate, 0 are missing" in said(kit, kit.tensors)


def test_stages_come_in_order_and_missing_tensors_are_one_line_a_stage(kit):
    text = said(kit, {"image": kit.tensors["image"], "context": 1.01 * kit.tensors["context"]})
    assert f"1 of {len(kit.tensors)} tensors pass, 1 deviate, {len(kit.tensors) - 2} are missing" in text
    stages = [line.split(":")[0] for line in text.split("\n\n")[0].splitlines() if not line.startswith(" ")]
    assert stages == [stage for stage, _ in groupby(row["stage"] for row in kit.rows)]
    assert "clip_l: not in your file: clip_l.ids, clip_l.layer_0, clip_l.penultimate, clip_l.pooled\n" in text
    assert "first deviation: context, in stage start: 1.0e-02 of" in text


def test_a_deviation_behind_a_missing_tensor_says_so_unless_it_was_fed(kit):
    theirs = {name: kit.tensors[name] for name in ("clip_l.penultimate", "t5.states")}
    theirs["context"] = 1.01 * kit.tensors["context"]
    hint = "its input {} is not in your file: check that first"
    text = said(kit, theirs)
    assert hint.format("clip_g.penultimate") in text and hint.format("t5.states") not in text
    assert "is not in your file" not in report(compare(kit, theirs, fed=True), fed=True)


def test_the_first_deviation_is_the_first_in_the_kits_order(kit):
    broken = {name: kit.tensors[name] * 1.001 for name in ("velocity.guided", "dual.0.attention.q", "t5.states")}
    assert "first deviation: t5.states" in said(kit, broken)
    del broken["t5.states"]
    assert "first deviation: dual.0.attention.q, in stage dual.0" in said(kit, broken)


def test_a_deviation_as_small_as_the_tolerance_passes_and_twice_that_does_not(kit):
    for name in ("image", "dual.0.attention.v", "dual.0.repulsion.kernel"):
        tensor = kit.tensors[name].double()
        tolerances = next(row["tolerance"] for row in kit.rows if row["name"] == name)
        for dtype, fed in product(tolerances, (False, True)):
            for factor, passed in ((0.9, True), (1.1, False)):
                theirs = {name: tensor * (1 + factor * tolerances[dtype]["fed" if fed else "whole"])}
                (row,) = [row for row in compare(kit, theirs, fed, dtype) if row.passed is not None]
                assert row.passed is passed


def test_wrong_shapes_are_said_with_the_transposition_that_fits(kit):
    q, ids = kit.tensors["dual.0.attention.q"], kit.tensors["t5.ids"]
    text = said(kit, {"dual.0.attention.q": q.transpose(1, 2), "t5.ids": ids[:1], "context": kit.tensors["context"][0]})
    assert "shape (8, 112, 4, 32), expected (8, 4, 112, 32): transposed by (0, 2, 1, 3) the shape fits, the val" in text
    assert "first deviation: t5.ids, in stage t5: shape (1, 24), expected (3, 24)" in text
    square = kit.tensors["image"].permute(0, 2, 3, 1)  # rows and columns are equally many: the values decide
    assert "transposed by (0, 3, 1, 2) the shape fits, the values fit too" in said(kit, {"image": square})
    assert "transposed by (0, 3, 1, 2) the shape fits, the values do not" in said(kit, {"image": 2 * square})


def test_nan_and_infinity_are_said(kit):
    image = kit.tensors["image"].clone()
    image[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert "first deviation: image, in stage image: NaN or infinity in 3 of 196608" in said(kit, {"image": image})


def test_one_wrong_id_and_pixels_a_level_off_deviate(kit):
    ids = kit.tensors["clip_g.ids"].clone()
    ids[1, 1] += 1
    assert "first deviation: clip_g.ids" in said(kit, {"clip_g.ids": ids})
    pixels = kit.tensors["pixels"].int()
    few = torch.zeros_like(pixels).flatten()
    few[::200] = 1
    assert "0 deviate" in said(kit, {"pixels": pixels + few.view_as(pixels)})
    assert "first deviation: pixels" in said(kit, {"pixels": pixels + 1})


def test_a_mistake_further_down_is_found_as_well_where_stages_are_fed_from_the_kit(kit):
    wide = {name: tensor.double() for name, tensor in kit.tensors.items()}
    text = report(compare(kit, {"time_in.in": wide["time_in.in"].roll(128, -1),
                                "velocity.guided": wide["velocity.conditional"]}, fed=True), fed=True)
    assert "found: sines before cosines" in text and "also found at velocity.guided: no guidance" in text


def test_without_the_checkpoint_mistakes_that_need_no_weights_are_found(kit):
    elsewhere = replace(kit, run=kit.run | {"model": "/nowhere"})
    assert "found: no guidance" in said(elsewhere, {"velocity.guided": kit.tensors["velocity.conditional"]})
    wrong = {"context_in.out": kit.tensors["context_in.out"].flip(0)}
    assert "usual causes" in said(elsewhere, wrong)


def test_a_zero_tensor_is_no_division_by_zero(kit):
    assert "first deviation: image, in stage image: 1.0e+00 of" in said(kit, {"image": 0 * kit.tensors["image"]})


# ---- files


def test_npz_files_are_read_as_numpy_writes_them(kit, tmp_path):
    arrays = {name: kit.tensors[name].numpy() for name in ("t5.ids", "context", "pixels", "dual.0.repulsion.gram")}
    arrays["context"] = np.asfortranarray(arrays["context"].astype(np.float64))
    arrays["t5.ids"] = arrays["t5.ids"].astype(np.int32)
    arrays |= {"scalar": np.float16(0.5), "empty": np.zeros((0, 3), np.float32), "flags": np.array([True, False]),
               "big": np.arange(3, dtype=">f4")}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", **arrays)
        found = files.read(tmp_path / "theirs.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].shape == array.shape and (found[name].numpy() == array).all()
            assert found[name].numpy().dtype == array.dtype.newbyteorder("=")


def test_bfloat16_which_numpy_stores_without_its_type_is_read(tmp_path):
    exact = torch.tensor([[1.0, -2.5, 3.140625], [1e30, 0.0, -torch.inf]]).bfloat16()
    np.savez(tmp_path / "theirs.npz", a=exact.view(torch.int16).numpy().view("V2"))
    found = files.read(tmp_path / "theirs.npz")["a"]
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact)


def with_npy(content):
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", content)

    return write


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.npz", None, "does not exist or is no file"), ("none.safetensors", None, "does not exist or is no file"),
    ("text.npz", b"hello", "cannot be read"), ("empty.npz", b"", "cannot be read"),
    ("text.safetensors", b"hello", "cannot be read"), ("pickle.pt", b"hello", "write it with safetensors or numpy"),
    ("array.npz", npy(np.zeros(3)), "cannot be read"), ("cut.npz", with_npy(npy(np.zeros(3))[:-5]), "cannot be read"),
    ("words.npz", with_npy(npy(np.array(["a", "b"]))), "arrays of numbers only"),
    ("objects.npz", with_npy(npy(np.array([1, None]))), "cannot be read"),
    ("json.npz", with_npy(b"{}"), "arrays of numbers only"),
    ("others.npz", with_npy(npy(np.zeros(3))), "none of the kit's tensors is there, the first is a: name tensors"),
])  # fmt: skip
def test_files_that_cannot_be_used_end_in_one_line(tiny, tmp_path, monkeypatch, capsys, name, content, message):
    file = tmp_path / name
    if callable(content):
        content(file)
    elif content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["porting", "check", str(tiny), str(file)])
    assert program.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


# ---- the program


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["porting", *map(str, arguments)])
    return program.main()


def test_exit_codes_tell_a_port_that_passes_from_one_that_does_not(tiny, kit, tmp_path, monkeypatch, capsys):
    def code(tensors, *options):
        save_file({name: x.contiguous() for name, x in (tensors).items()}, tmp_path / "theirs.safetensors")
        try:
            return run(monkeypatch, "check", tiny, tmp_path / "theirs.safetensors", *options)
        except SystemExit as stop:
            return stop.code

    some = {name: kit.tensors[name] for name in ("sigmas", "context")}
    assert code(kit.tensors) == code(kit.tensors, "--fed") == code(some, "--partial") == 0
    assert code(some) == 1  # all must be there
    assert code(kit.tensors | {"my_own": torch.ones(3)}) == 0
    assert "1 tensors of theirs.safetensors are not in the kit, such as my_own" in capsys.readouterr().out
    wrong = some | {"velocity.guided": kit.tensors["velocity.conditional"]}
    assert code(wrong, "--partial") == code(wrong) == 1
    assert "found: no guidance" in capsys.readouterr().out
    rough = {name: tensor * 1.001 if tensor.dtype == torch.float32 else tensor for name, tensor in kit.tensors.items()}
    assert code(rough) == code(rough, "--dtype", "tf32", "--fed") == 1 and code(rough, "--dtype", "bfloat16") == 0
    assert run(monkeypatch, "check", tmp_path, tmp_path / "theirs.safetensors") == 2
    assert "is no kit, manifest.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny-flux", "tiny-turbo"])
def test_write_says_what_it_wrote(tmp_path, monkeypatch, capsys, model):
    steps = Pipeline.load(model).defaults.repulsion.start + 1
    options = ("--model", model, "--prompt", "a star", "--steps", steps, "--seed", 3, "--strength", 0.5, "--iterations",
               2, "--height", 32, "--width", 48)
    assert run(monkeypatch, "write", tmp_path / "kit", *options) == 0
    assert "tensors" in (out := capsys.readouterr().out) and "start with PORTING.md" in out
    assert run(monkeypatch, "write", tmp_path / "kit") == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, "check", tmp_path / "kit", tmp_path / "kit" / "kit.safetensors") == 0
    kit = Kit.read(tmp_path / "kit")
    assert kit.run["repulsion"] | {"strength": 0.5, "iterations": 2, "scale": None} == kit.run["repulsion"]
    assert torch.equal(kit.tensors["noise"], starting_noise(3, 2, (16, 4, 6)))
    assert kit.tensors["pixels"].shape == (2, 32, 48, 3)


@pytest.mark.parametrize("arguments", [[], ["check"], ["write"], ["prove", "it"]])
def test_arguments_that_cannot_be_parsed_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        program.parser().parse_args(arguments)
    assert stop.value.code == 2
