"""A kit is correct: its tensors are the program's, its formulas give them, its tolerances are measured."""

import json
import re
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_flux2 import dev, klein
from small_pipelines import saved, sd3
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmdit.blocks
import porting.kit
from mmdit import TextDecoder, trace
from porting import Kit, Run, compare, record, report, write
from porting.evaluate import Weights, evaluate, find
from porting.kit import MARGIN, ROUNDING, Tf32
from porting.stages import Sheet, networks
from repulsion import cosine_kernel
from repulsion.solvers import gradient_matrix
from sampler import Pipeline, starting_noise
from tests.porting.conftest import PROMPTS

BOTH = pytest.mark.parametrize("which", ["kit", "flux_kit"])


@pytest.fixture
def found(which, request):
    return request.getfixturevalue(which)


# ---- the formulas, against the modules of the program


@pytest.mark.parametrize("which", ["", "flux_"])
def test_each_formula_gives_what_the_program_computes(which, request):
    """In float64, to rounding: what `trace` and the pipeline saw, from what they saw."""
    run, kit = request.getfixturevalue(f"{which}run"), request.getfixturevalue(f"{which}kit")
    pipeline = Pipeline.load(run.model, dtype=torch.float64)
    assert_formulas_hold(pipeline, run, {row["name"] for row in kit.rows})


def assert_formulas_hold(pipeline, run, names):
    weights = Weights(networks(run.model))
    found = record(pipeline, run, weights)
    assert found.keys() == names
    for entry in Sheet(run).entries:
        if entry.formula:
            ours, theirs = evaluate(entry, found, weights).double(), found[entry.name].double()
            # what the sampler keeps in float32; a value in a hundred thousand that lies between two bytes
            limit = 1e-6 if entry.stage in ("steps", "start") else 1e-3 if entry.name == "pixels" else 1e-12
            assert (ours - theirs).norm() <= limit * theirs.norm(), entry.name


@pytest.mark.parametrize("make", [lambda: klein(is_distilled=False), dev], ids=["klein-base", "dev"])
def test_flux2_s_formulas_give_what_the_program_computes(tmp_path, make):
    """Qwen3 and Mistral, with padding behind and before; guidance of two branches and as an input."""
    saved(make(), tmp_path / "flux2")
    pipeline = Pipeline.load(tmp_path / "flux2", dtype=torch.float64)
    run = Run.of(pipeline, str(tmp_path / "flux2"), PROMPTS, height=64, width=64, steps=2)
    entries = {entry.name: entry for entry in Sheet(run).entries}
    assert_formulas_hold(pipeline, run, entries.keys())

    weights, decoder = Weights(networks(run.model)), pipeline.text.decoder.module
    found, ids = record(pipeline, run, weights), pipeline.text.tokenizer(list(run.prompts))
    gate, value = found["dual.0.image.mlp.in_layer.out"].chunk(2, -1)
    earlier = TextDecoder(replace(decoder.config, layers=tuple(layer - 1 for layer in decoder.config.layers))).double()
    earlier.load_state_dict(decoder.state_dict(), strict=False)
    uncounted = found["dual.0.rope.in"].clone()
    uncounted[0, : ids.shape[1]], uncounted[1, : ids.shape[1]] = 1, 0  # cosine and sine of 0
    mask = pipeline.text.tokenizer.mask(list(run.prompts))
    with torch.no_grad(), trace(decoder, "layers.0.out") as passes:
        decoder(ids)
        (unmasked,) = passes
        for name, mistaken, words in [
            ("dual.0.image.mlp.activation.out", F.silu(value) * gate, "gate and value swapped"),
            ("text.states", earlier(ids, mask), "the states of the layers before"),
            ("text.layer_0", unmasked["layers.0.out"], "padding not masked"),
            ("dual.0.rope.in", uncounted, "context tokens not counted on the fourth axis"),
        ]:
            assert (find(entries[name], found, weights, mistaken.double()) or "").startswith(words), name


@pytest.mark.parametrize("which", ["", "flux_"])
def test_what_no_module_computes_is_the_pipeline_s_as_well(which, request):
    """Contexts, pooled vectors, modulations, velocities, the push's inside: by formula in the kit, here by trace."""
    run, kit = request.getfixturevalue(f"{which}run"), request.getfixturevalue(f"{which}kit").tensors
    pipeline = Pipeline.load(run.model, dtype=torch.float64)
    texts = pipeline.text(*run.prompts)
    assert close(kit["context"], texts[0]) and close(kit["pooled"], texts[1])
    assert torch.equal(kit["sigmas"], pipeline.sigmas(run.steps, run.height, run.width))
    noise = kit["noise"].split(2)
    for i, prompt in enumerate(run.prompts[run.branches - 1 :]):
        with trace(pipeline.transformer, lambda name: "modulation." in name or "velocity" in name or "repulsion" in name
                   or name.endswith("context.in")) as passes:
            latent, _ = pipeline(prompt, 2, steps=run.steps, noise=noise[i], repulsion=run.repulsion, decode=False)
        own = slice(2 * i, 2 * i + 2)
        assert close(kit[f"latent.{run.steps}"][own], latent)
        branches = passes[0]["velocity.out"].chunk(run.branches)
        assert close(kit["velocity.conditional"][own], branches[-1])
        shift, scale = (passes[0][f"dual.0.image.modulation.{part}.out"][-2:, 0] for part in ("shift", "scale"))
        batch = kit["dual.0.image.modulation"][-4:][own]
        assert close(batch[:, 0], shift) and close(batch[:, 1], scale)
        tokens = passes[0]["dual.0.repulsion.in"][-2:].flatten(1)
        gram = kit["dual.0.repulsion.gram"][-2:][i]
        assert close(gram, tokens @ tokens.mT)
        assert close(kit["dual.0.repulsion.kernel"][-2:][i], cosine_kernel(tokens))
        out = passes[0]["dual.0.repulsion.out"][-2:].flatten(1)
        assert close(kit["dual.0.repulsion.mixing"][-2:][i] @ tokens, out - tokens)
        gradient = gradient_matrix(gram[None].numpy(), "vendi", 1e-4)[0] @ tokens.numpy()
        assert close(kit["dual.0.repulsion.gradient"][-4:][own].flatten(1), torch.from_numpy(gradient))


def close(found, wanted):
    """The kit is of a run with features in float64, the pipeline computes them in float32."""
    return (found.double() - wanted.double()).norm() < 1e-4 * wanted.norm()


@BOTH
def test_inputs_stand_before_what_is_computed_from_them(found):
    seen = set()
    for row in found.rows:
        assert seen >= {*row["inputs"].values()}, row["name"]
        assert row["name"] not in seen
        seen.add(row["name"])


def test_token_ids_and_noise_are_those_of_the_prompts_and_the_seed(kit):
    text = Pipeline.load("tiny-sd3").text
    for role, (tokenizer, _) in zip(("clip_l", "clip_g", "t5"), [*text.clips, text.t5], strict=True):
        assert torch.equal(kit.tensors[f"{role}.ids"], tokenizer(["", *PROMPTS], length=24))
    assert torch.equal(kit.tensors["noise"], starting_noise(0, 4, (16, 16, 16)))


def test_the_pictures_are_those_of_the_pipeline(kit, run, tiny_model):
    """Both prompts', each with its part of the noise: the order of a batch is prompt after prompt."""
    pipeline = Pipeline.load(tiny_model, dtype=torch.float32)
    for i, prompt in enumerate(PROMPTS):
        noise = kit.tensors["noise"][2 * i : 2 * i + 2]
        ours = pipeline(prompt, 2, steps=1, noise=noise, repulsion=pipeline.defaults.repulsion)
        found = kit.tensors["pixels"][2 * i : 2 * i + 2].int() - torch.from_numpy(np.stack(ours)).int()
        assert found.abs().max() <= 1


def test_second_attentions_late_repulsion_and_no_t5(tmp_path):
    _, pipeline = saved(sd3("rms_norm", dual_attention=(0, 1), with_t5=False), tmp_path / "model")
    push = {"strength": 0.5, "iterations": 2, "start": 1, "blocks": [1, 2], "objective": "dpp"}
    sampling = {"steps": 3, "guidance": 3.5, "height": 32, "width": 48, "repulsion": push}
    (tmp_path / "model" / "sampling.json").write_text(json.dumps(sampling))
    write(tmp_path / "kit", str(tmp_path / "model"), "a star", images=3)
    found = Kit.read(tmp_path / "kit")
    names = [row["name"] for row in found.rows]
    assert names.index("latent.1") < names.index("time_in.in") < names.index("latent.2")  # the inside is step 1's
    assert "dual.0.image_attention.out" in names and "t5.ids" not in names
    assert found.tensors["dual.1.repulsion.gram"].shape == (2, 3, 3) and "dual.0.repulsion.in" not in names
    pipeline = Pipeline.load(tmp_path / "model", dtype=torch.float64)
    assert_formulas_hold(pipeline, Run.of(pipeline, str(tmp_path / "model"), "a star", 3), {*names})
    broken = found.tensors | {"dual.1.repulsion.in": found.tensors["dual.1.repulsion.in"].flip(-1)}
    (wrong,) = [row for row in compare(found, broken) if not row.passed]
    assert wrong.entry.stage == "dual.1.repulsion"
    assert "the context that leaves the attention of dual.1" in wrong.entry.words


@pytest.mark.parametrize("settings", [
    {"blocks": "middle", "objective": "rke", "single_stream_tokens": "context"},
    {"objective": "cosine", "single_stream_tokens": "none", "strength": 0.7, "scale": None},
], ids=["middle blocks, context", "no single-stream blocks, strength"])
def test_other_settings_of_the_push_have_formulas_too(flux_model, flux_pipeline, settings):
    defaults = flux_pipeline.defaults
    pipeline = Pipeline.load(flux_model, dtype=torch.float64)
    pipeline.defaults = replace(defaults, repulsion=replace(defaults.repulsion, **settings))
    run = Run.of(pipeline, str(flux_model), PROMPTS)
    assert_formulas_hold(pipeline, run, {entry.name for entry in Sheet(run).entries})


# ---- tolerances


@BOTH
def test_tolerances_follow_from_what_was_measured(found):
    for row in found.rows:
        tensor = found.tensors[row["name"]]
        assert list(tensor.shape) == row["shape"] and str(tensor.dtype) == f"torch.{row['dtype']}"
        for dtype, measured in row["measured"].items():
            for kind in ("whole", "fed"):
                if tensor.is_floating_point():
                    assert row["tolerance"][dtype][kind] == MARGIN * max(measured[kind], ROUNDING[dtype])
        if tensor.is_floating_point():
            # 2^-24 a rounding, some hundred of them in a row and features of 1000 σ, or 3500 for the guidance
            assert row["tolerance"]["float32"]["whole"] < 1e-3
        else:
            assert row["measured"]["float32"]["whole"] < 0.02


@BOTH
def test_fed_tolerances_are_below_those_of_a_whole_run_and_grow_with_the_dtype(found):
    rows = [row for row in found.rows if row["formula"] and "float32" in row["dtype"]]
    ratio = [row["tolerance"]["float32"]["whole"] / row["tolerance"]["float32"]["fed"] for row in rows]
    assert statistics.median(ratio) > 3
    for low, high in (("float32", "tf32"), ("tf32", "bfloat16")):
        median = {x: statistics.median(row["tolerance"][x]["fed"] for row in rows if row["weights"])
                  for x in (low, high)}
        assert median[high] > 10 * median[low]


def test_other_orders_of_the_sums_pass_with_room_to_spare(kit, run, pipeline):
    before = torch.get_num_threads()
    with sdpa_kernel(SDPBackend.MATH):
        torch.set_num_threads(2)
        try:
            found = record(pipeline, run)
        finally:
            torch.set_num_threads(before)
    assert all(row.passed for row in compare(kit, found))
    assert max(of_allowed(kit, found).values()) < 0.3


def of_allowed(kit, found):
    """Each tensor's deviation as a share of its tolerance."""
    off = {}
    for row in kit.rows:
        if "float" in row["dtype"]:
            a, b = found[row["name"]].double(), kit.tensors[row["name"]].double()
            off[row["name"]] = ((a - b).norm() / b.norm()).item() / row["tolerance"]["float32"]["whole"]
    return off


def test_float64_passes_and_bfloat16_passes_its_own_tolerances_alone(kit, run, tiny_model):
    exact = record(Pipeline.load(tiny_model, dtype=torch.float64), run)
    assert all(row.passed for row in compare(kit, exact))
    with sdpa_kernel(SDPBackend.MATH):
        rough = record(Pipeline.load(tiny_model, dtype=torch.bfloat16), run)
    wrong = [row.entry.name for row in compare(kit, rough) if row.passed is False]
    assert wrong[0] == "clip_l.layer_0" and "latent.1" in wrong
    assert not [row.entry.name for row in compare(kit, rough, dtype="bfloat16") if row.passed is False]


def test_a_mistake_in_bfloat16_is_found(kit, run, tiny_model, monkeypatch):
    pipeline = Pipeline.load(tiny_model, dtype=torch.bfloat16)
    own = mmdit.blocks.modulate
    monkeypatch.setattr(mmdit.blocks, "modulate", lambda x, by: own(x, by._replace(scale=by.scale - 1)))
    text = report(compare(kit, record(pipeline, run), dtype="bfloat16"))
    assert "first deviation: dual.0.attention.context.in" in text and "found: scale for 1 + scale" in text


def test_tf32_rounds_products_to_11_bits():
    x = torch.tensor([[1 + 2.0**-10, 1 + 2.0**-12, 1 + 2.0**-11 + 2.0**-13]])
    with Tf32():
        found = F.linear(torch.eye(3), x)
        assert torch.equal(x + 0, x)
    assert found.flatten().tolist() == [1 + 2.0**-10, 1, 1 + 2.0**-10]


# ---- the folder


def test_the_kit_of_a_whole_run_is_small(tiny, kit):
    latents = 20 * kit.tensors["latent.1"].nbytes
    # most of it is the levels of the decoder
    assert (tiny / "kit.safetensors").stat().st_size + latents < 40e6


def test_the_library_reads_what_is_written(tiny, kit):
    theirs = load_file(tiny / "kit.safetensors")
    assert theirs.keys() == kit.tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in kit.tensors.items())
    assert {file.name for file in tiny.iterdir()} == {"kit.safetensors", "manifest.json", "PORTING.md"}


def test_the_page_walks_through_every_tensor_in_order(tiny, kit):
    page = (tiny / "PORTING.md").read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [row["name"] for row in kit.rows]
    for row in kit.rows:
        assert f"## {row['stage']}\n" in page and (f"`{row['formula']}`" if row["formula"] else row["words"]) in page
        assert all(name in page for name in row["weights"])
    for said in ("“a circle”", "python -m porting check tiny yours.npz --fed", "def tap(name, x)", "`safetensors`",
                 "1.5 / 3", "dual.0, dual.1, dual.2, dual.3, dual.4, dual.5, dual.6,", "In the steps 0 … 0",
                 "def mixing(", "def vendi(", "`transformer_blocks.0.attn.add_q_proj.weight`", "jax_default_matmul",
                 "(stored as (scale, shift))", "Usual mistakes: "):
        assert said in page, said
    assert "def rope(" not in page and "def inside(" not in page  # of the other family, and of a mistake


def test_the_weights_that_a_page_names_are_all_of_the_files(flux_kit, flux_model):
    """Of blocks that the kit holds, and no other names: the union is what the checkpoint's files have."""
    named = {name for row in flux_kit.rows for x in row["weights"] for name in re.findall("`(.*?)`", x)[0].split(" + ")}
    stored = {name for file in flux_model.glob("t*/*.safetensors") for name in load_file(file)}
    stored |= {name for file in flux_model.glob("vae/*.safetensors") for name in load_file(file) if "decoder" in name}
    assert named == stored - {name for name in stored if "embed_tokens" in name}


def test_an_older_kit_stays_unless_told_otherwise(tmp_path):
    folder = tmp_path / "kit"
    write(folder, steps=1)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write(folder, prompt="a star", steps=1)
    assert (folder / "manifest.json").read_bytes() == before
    write(folder, prompt="a star", steps=1, overwrite=True)
    assert Kit.read(folder).run["prompts"] == ["", "a star"]


def test_nothing_is_left_of_a_kit_that_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(porting.kit, "page", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "kit", steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "message"), [
    ({"images": 1}, "at least 2 images, which repel each other"), ({"steps": 0}, "at least 1 steps"),
    ({"prompt": " "}, "the prompt is empty"), ({"model": "tiny-sd9"}, "tiny-sd9 does not exist"),
])  # fmt: skip
def test_runs_that_cannot_be_are_named_and_nothing_is_written(tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write(tmp_path / "deep" / "kit", **call)
    assert list(tmp_path.iterdir()) == []


def test_kits_that_are_no_kits_are_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json is missing: write one with python -m porting write"):
        Kit.read(tmp_path)
    manifest = json.loads((tiny / "manifest.json").read_text())
    shutil.copy(tiny / "kit.safetensors", tmp_path)
    for broken, message in (
        ("{", "Expecting property name"), ("[]", "list indices"), (json.dumps({"run": manifest["run"]}), "'tensors'"),
        (json.dumps(manifest | {"tensors": manifest["tensors"][1:]}), "do not list the same tensors"),
    ):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match=f"is no kit that can be read.*{message}.*write it again"):
            Kit.read(tmp_path)
