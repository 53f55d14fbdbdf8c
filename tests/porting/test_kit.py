"""A kit is correct: its tensors follow from its formulas and inputs, and its tolerances from measurements."""

import json
import math
import re

import pytest
import torch
from einops import rearrange
from small_pipelines import saved, sd3
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmdit.model
import porting.kit
from porting import Kit, Run, compare, files, record, write
from porting.kit import MARGIN, ROUNDING
from sampler import Pipeline, starting_noise

BOTH = pytest.mark.parametrize("which", ["kit", "flux_kit"])


@pytest.fixture
def found(which, request):
    return request.getfixturevalue(which)


# ---- each stage by hand, from the kit's own inputs


def angles_of(t, run):
    return 1000 * t[..., None] * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)


def modulated(x, shift, scale):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * (1 + scale) + shift


def tanh_gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def unpatched(x, h, w):
    b, c = len(x), x.shape[-1] // 4
    return x.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def dual_blocks(t, run):
    for i in sorted({0, run.transformer.num_dual_blocks - 1}):
        block = f"dual.{i}"
        ends = f"{block}.context.mlp.in" not in t
        for s in ("image",) if ends else ("context", "image"):
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *_ = t[f"{block}.{s}.modulation"].unsqueeze(2).unbind(1)
            yield f"{block}.attention.{s}.in", modulated(t[f"{block}.{s}.in"], shift, scale)
            x = t[f"{block}.{s}.in"] + gate * t[f"{block}.attention.{s}.out"]
            yield f"{block}.{s}.mlp.in", modulated(x, mlp_shift, mlp_scale)
            yield f"{block}.{s}.mlp.activation.out", tanh_gelu(t[f"{block}.{s}.mlp.in_layer.out"])
            yield f"{block}.{s}.out", x + mlp_gate * t[f"{block}.{s}.mlp.out"]
        yield from attention(t, block)


def attention(t, block):
    q, k, v = (t[f"{block}.attention.{name}"] for name in "qkv")
    scores = torch.einsum("bhnk,bhmk->bhnm", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    yield f"{block}.attention.attended", torch.einsum("bhnm,bhmk->bhnk", weights, v)


def single_blocks(t, run):
    for i in range(run.transformer.num_single_blocks):
        block = f"single.{i}"
        shift, scale, _ = t[f"{block}.modulation"].unsqueeze(2).unbind(1)
        yield f"{block}.linear_in.in", modulated(t[f"{block}.tokens.in"], shift, scale)
        yield from attention(t, block)
        yield f"{block}.repulsion.in", rearrange(t[f"{block}.attention.attended"], "b h n k -> b n (h k)")
        yield f"{block}.activation.out", tanh_gelu(t[f"{block}.activation.in"])
        yield f"{block}.linear_out.in", torch.cat([t[f"{block}.repulsion.out"], t[f"{block}.activation.out"]], -1)


def gradient_matrix(gram, eps):
    """D of Σ_j D_ij c_j = ∂H/∂c_i, with the kernel and the eigenvalues that it is computed from."""
    b, r = gram.shape[-1], gram.diagonal(dim1=1, dim2=2).rsqrt()
    kernel = gram * r[:, :, None] * r[:, None, :]
    values, vectors = torch.linalg.eigh((kernel + eps * torch.eye(b)) / (b * (1 + eps)))
    w = vectors @ torch.diag_embed(-values.log() - 1) @ vectors.mT / (b * (1 + eps))  # ∂H/∂K
    w = w * (1 - torch.eye(b))
    return 2 * (w * r[:, :, None] * r[:, None, :] - torch.diag_embed((w * kernel).sum(2) * r**2)), kernel, values


def one_push(t, run):
    """Eq. 3 and 4, their gradient, and the steps along it, in the words of the kit."""
    place, r = "dual.0.repulsion", run.repulsion
    tokens, gram = t[f"{place}.in"], t[f"{place}.gram"]
    c = tokens.flatten(1).unflatten(0, (len(run.prompts), run.images))
    d, kernel, _ = gradient_matrix(gram, r.kernel_reg)
    yield f"{place}.gram", c @ c.mT
    yield f"{place}.kernel", kernel
    _, _, values = gradient_matrix(t[f"{place}.kernel"], r.kernel_reg)
    yield f"{place}.spectrum", values
    yield f"{place}.gradient", (d @ c).view_as(tokens)
    a = torch.eye(run.images).double().expand_as(gram)
    for _ in range(r.iterations):
        direction = gradient_matrix(a @ gram @ a.mT, r.kernel_reg)[0] @ a
        length = (r.scale or 0) / r.iterations
        if r.strength is not None:
            moved = (direction @ gram @ direction.mT).diagonal(dim1=1, dim2=2).sum(1)
            length = (r.strength / r.iterations * (gram.diagonal(dim1=1, dim2=2).sum(1) / moved).sqrt())[:, None, None]
        a = a + length * direction
    yield f"{place}.mixing", a - torch.eye(run.images)
    yield f"{place}.out", tokens + (t[f"{place}.mixing"] @ c).view_as(tokens)


def the_rest(t, run):
    sd3, clips = run.transformer.position == "table", [role for role in run.encoders if role != "t5"]
    if sd3:
        states = torch.cat([t[f"{role}.penultimate"] for role in clips], -1)
        yield "context", torch.cat([F.pad(states, (0, t["t5.states"].shape[-1] - states.shape[-1])), t["t5.states"]], 1)
    yield "pooled", torch.cat([t[f"{role}.pooled"] for role in clips], -1)
    angles = angles_of(t["sigmas"][0], run).expand(len(t["time_in.in"]), -1)
    yield "time_in.in", torch.cat([angles.cos(), angles.sin()], -1)
    x = t["noise"].unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    yield "image_in.in", x.repeat(len(run.prompts), 1, 1)
    last = f"single.{run.transformer.num_single_blocks - 1}.tokens.out" if not sd3 else "dual.7.image.out"
    image = t[last][:, -t["image_in.in"].shape[1] :]
    yield "image_out.in", modulated(image, *t["final_modulation"].unsqueeze(2).unbind(1))
    velocities = unpatched(t["image_out.out"], *t["noise"].shape[2:]).chunk(len(run.prompts))
    yield "velocity.conditional", velocities[-1]
    if sd3:
        yield "velocity.unconditional", velocities[0]
        u, c = t["velocity.unconditional"], t["velocity.conditional"]
        yield "velocity.guided", (1 - run.guidance) * u + run.guidance * c
    yield "latent.1", t["noise"] - (t["sigmas"][0] - t["sigmas"][1]) * t["velocity.guided"]
    yield "decoder.in", t[f"latent.{run.steps}"] / run.autoencoder.scaling + run.autoencoder.shift
    pixels = (t["image"].clamp(-1, 1) * 127.5 + 127.5).round()
    yield "pixels", pixels.permute(0, 2, 3, 1)


@BOTH
def test_each_stage_follows_from_the_kits_own_inputs(found):
    wide = {name: tensor.double() for name, tensor in found.tensors.items()}
    by_hand = {}
    for stage in (dual_blocks, single_blocks, one_push, the_rest):
        by_hand |= dict(stage(wide, found.run))
    assert len(by_hand) > 25
    rows = {row.entry.name: row for row in compare(found, by_hand)}
    assert not {name: rows[name].said for name in by_hand if not rows[name].passed}


@BOTH
def test_inputs_stand_before_what_is_computed_from_them(found):
    seen = set()
    for row in found.rows:
        assert seen >= {*row["inputs"]}, row["name"]
        assert row["name"] not in seen
        seen.add(row["name"])


def test_token_ids_and_noise_are_those_of_the_prompt_and_the_seed(kit):
    text = Pipeline.load("tiny-sd3").text
    for role, (tokenizer, _) in zip(("clip_l", "clip_g", "t5"), [*text.clips, text.t5], strict=True):
        assert torch.equal(kit.tensors[f"{role}.ids"], tokenizer(["", "a circle"], length=24))
    assert torch.equal(kit.tensors["noise"], starting_noise(0, 2, (6, 16, 16)))


def test_the_run_comes_back_from_json(kit, pipeline, tiny_model):
    assert kit.run == Run.of(pipeline, str(tiny_model), "a circle", steps=1)
    assert kit.run.prompts == ("", "a circle") and kit.run.repulsion == pipeline.defaults.repulsion


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
    t = {name: tensor.double() for name, tensor in found.tensors.items()}
    by_hand = dict(dual_blocks(t, found.run)) | {
        "dual.0.image.mlp.in": modulated(residual(t), *t["dual.0.image.modulation"].unsqueeze(2)[:, 3:5].unbind(1)),
        "dual.0.image.out": residual(t) + t["dual.0.image.modulation"][:, 5, None] * t["dual.0.image.mlp.out"]}
    rows = compare(found, by_hand)
    assert not [row.entry.name for row in rows if row.passed is False]
    broken = {name: tensor.flip(-1) if name == "dual.1.repulsion.in" else tensor for name, tensor in t.items()}
    (wrong,) = [row for row in compare(found, broken) if not row.passed]
    assert wrong.entry.stage == "dual.1.repulsion"
    assert "the context output of the attention of dual.1" in wrong.entry.formula


def residual(t):
    """The image after both attentions of block 0."""
    _, _, gate, *_, second_gate = t["dual.0.image.modulation"].unsqueeze(2).unbind(1)
    joint, own = t["dual.0.attention.image.out"], t["dual.0.image_attention.out"]
    return t["dual.0.image.in"] + gate * joint + second_gate * own


# ---- tolerances


@BOTH
def test_tolerances_follow_from_what_was_measured(found):
    for row in found.rows:
        tensor = found.tensors[row["name"]]
        assert list(tensor.shape) == row["shape"] and str(tensor.dtype) == f"torch.{row['dtype']}"
        if tensor.is_floating_point():
            # 2^-24 a rounding, some hundred of them in a row and features of 1000 σ, or 3500 for the guidance
            assert row["tolerance"] == MARGIN * max(row["measured"], ROUNDING) < 1e-3
        else:
            assert row["measured"] < 0.02


def test_other_orders_of_the_sums_pass_with_room_to_spare(kit, pipeline):
    with sdpa_kernel(SDPBackend.MATH):
        torch.set_num_threads(2)
        try:
            found = record(pipeline, kit.run)
        finally:
            torch.set_num_threads(1)
    assert all(row.passed for row in compare(kit, found))
    assert max(of_allowed(kit, found).values()) < 0.3


def of_allowed(kit, found):
    """Each tensor's deviation as a share of its tolerance."""
    off = {}
    for row in kit.rows:
        if "float" in row["dtype"]:
            a, b = found[row["name"]].double(), kit.tensors[row["name"]].double()
            off[row["name"]] = ((a - b).norm() / b.norm()).item() / row["tolerance"]
    return off


def test_float64_passes_and_bfloat16_does_not(kit):
    exact = record(Pipeline.load("tiny-sd3", dtype=torch.float64), kit.run)
    assert all(row.passed for row in compare(kit, exact))
    rough = compare(kit, record(Pipeline.load("tiny-sd3", dtype=torch.bfloat16), kit.run))
    wrong = [row.entry.name for row in rough if row.passed is False]
    assert wrong[0] == "clip_l.penultimate" and "latent.1" in wrong


def test_features_in_float64_pass_too(kit, monkeypatch):
    def features(t, width=256, max_period=10_000.0):
        angles = 1000 * t.double()[:, None] * max_period ** (-torch.arange(128).double() / 128)
        return torch.cat([angles.cos(), angles.sin()], -1)

    monkeypatch.setattr(mmdit.model, "timestep_features", features)
    exact = record(Pipeline.load("tiny-sd3", dtype=torch.float64), kit.run)
    assert max(of_allowed(kit, exact).values()) < 0.1  # one rounding to float32, where ten and more are allowed


# ---- the folder


def test_the_kit_of_a_whole_run_is_small(tiny, kit):
    latents = 20 * kit.tensors["latent.1"].nbytes
    assert (tiny / "kit.safetensors").stat().st_size + latents < 30e6


def test_the_library_reads_what_is_written(tiny, kit):
    from safetensors.torch import load_file

    theirs = load_file(tiny / "kit.safetensors")
    assert theirs.keys() == kit.tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in kit.tensors.items())
    assert {file.name for file in tiny.iterdir()} == {"kit.safetensors", "manifest.json", "PORTING.md"}


def test_the_page_walks_through_every_tensor_in_order(tiny, kit):
    page = (tiny / "PORTING.md").read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [row["name"] for row in kit.rows]
    for cells, row in zip(rows, kit.rows, strict=True):
        shape, formula, inputs, tolerance = cells[1:] if len(cells) == 5 else (*cells[1:3], "", cells[-1].strip("| "))
        assert shape == " × ".join(map(str, row["shape"])) + " " + row["dtype"]
        assert formula == row["formula"] and re.findall("`(.+?)`", inputs) == row["inputs"]
        assert float(tolerance) == pytest.approx(row["tolerance"], rel=0.05)
    for row in kit.rows:
        assert f"## {row['stage']}" in page and all(cause in page for cause in row["causes"])
    for said in ("“a circle”", "python -m porting check tiny yours.npz", "strength=1.5", "taken from the kit"):
        assert said in page
    frame = page.split("## This run")[0].replace(kit.run.model, "tiny-sd3")
    assert max(len(line) for line in frame.splitlines()) <= 120


def test_an_older_kit_stays_unless_told_otherwise(tmp_path):
    folder = tmp_path / "kit"
    write(folder, steps=1)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write(folder, prompt="a star", steps=1)
    assert (folder / "manifest.json").read_bytes() == before
    write(folder, prompt="a star", steps=1, overwrite=True)
    assert Kit.read(folder).run.prompts == ("", "a star")


def test_nothing_is_left_of_a_kit_that_fails(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(porting.kit, "page", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "kit", steps=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "message"), [
    ({"images": 1}, "at least 2 images, which repel each other, got 1"), ({"steps": 0}, "needs at least 1 steps"),
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
    files.write(tmp_path / "kit.safetensors", Kit.read(tiny).tensors)
    for broken, message in (
        ("{", "Expecting property name"), ("[]", "list indices"), (json.dumps({"run": manifest["run"]}), "'tensors'"),
        (json.dumps(manifest | {"tensors": manifest["tensors"][1:]}), "do not list the same tensors"),
        (json.dumps(manifest | {"run": manifest["run"] | {"steps": 9}}), "do not list the same tensors"),
    ):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match=f"is no kit that can be read.*{message}.*write it again"):
            Kit.read(tmp_path)
