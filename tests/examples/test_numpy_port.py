"""The numpy port against our modules: network by network in float64, whole pictures in float32."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import examples.numpy_port
import porting
import weights
from examples.numpy_port import safetensors
from examples.numpy_port.checkpoint import load
from examples.numpy_port.repulsion import Repulsion as PortRepulsion
from examples.numpy_port.sampler import paint
from repulsion import Repulsion, repel
from sampler import Pipeline, starting_noise

FOLDER = weights.BUNDLED["tiny-sd3"]
PORT = Path(examples.numpy_port.__file__).parent
SHIPPED = json.loads((FOLDER / "sampling.json").read_text(encoding="utf-8"))
EXACT = 1e-12  # float64 sums of up to 600 products in some tens of layers: at most some thousand roundings of 1e-16
PROMPT = "a small green star left of a ring"


@pytest.fixture
def random():
    return np.random.default_rng(0)  # one for each test, in whatever order they run


def relative(found, wanted):
    wanted = wanted.detach().numpy()
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def torch_of(*arrays):
    return map(torch.from_numpy, arrays)


@pytest.fixture(scope="module")
def parts():
    return load(FOLDER, np.float64)[0]


@pytest.fixture(scope="module")
def model():
    return weights.load_transformer(FOLDER, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("tiny-sd3", dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs(pipeline):
    tokenizers = [tokenizer for tokenizer, _ in (*pipeline.text.clips, pipeline.text.t5)]
    ids = {f"{name}.ids": tokenizer(["", PROMPT]).numpy()
           for name, tokenizer in zip(("clip_l", "clip_g", "t5"), tokenizers, strict=True)}
    shape = (pipeline.config.latent_channels, 16, 16)
    return ids | {"noise": starting_noise(3, 2, shape).numpy()}


@pytest.fixture
def changed(tmp_path):
    """The checkpoint's folder with other entries in one of its JSON files."""

    def make(file, **entries):
        shutil.copytree(FOLDER, tmp_path / "model")
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
        return tmp_path / "model"

    return make


def test_it_imports_numpy_and_nothing_else():
    for file in PORT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{file.name} imports from outside its folder"
                names = [] if node.level else [node.module]
            assert {name.split(".")[0] for name in names} <= {"numpy"} | sys.stdlib_module_names, file.name


def test_it_has_less_than_500_lines():
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PORT.glob("*.py")) < 500


def test_the_files_are_read_bit_for_bit():
    files = list(FOLDER.glob("*/*.safetensors"))
    assert len(files) == 5
    for file in files:
        found, oracle = safetensors.read(file), load_file(file)
        assert found.keys() == oracle.keys()
        assert all((found[name] == tensor.float().numpy()).all() for name, tensor in oracle.items())


@pytest.mark.parametrize("name,folder", [("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")])
def test_clip(parts, inputs, name, folder):
    ids = inputs[f"{name}.ids"]
    ours = weights.load_text_encoder(FOLDER / folder, dtype=torch.float64)(torch.from_numpy(ids))
    penultimate, pooled = parts[name].encode(ids)
    assert relative(penultimate, ours.penultimate) < EXACT
    assert relative(pooled, ours.pooled) < EXACT


def test_t5_as_far_as_its_last_bucket(parts, random):
    ids = random.integers(0, 70, (2, 200))  # distances from 128 on share a bucket
    ours = weights.load_text_encoder(FOLDER / "text_encoder_3", dtype=torch.float64)(torch.from_numpy(ids))
    assert relative(parts["t5"].encode(ids), ours) < EXACT


def test_the_decoder(parts, pipeline, random):
    latent = random.standard_normal((2, pipeline.config.latent_channels, 4, 8))
    ours = weights.load_autoencoder(FOLDER, dtype=torch.float64).decode(torch.from_numpy(latent))
    assert relative(parts["autoencoder"].decode(latent), ours) < EXACT


@pytest.mark.parametrize("last", [False, True])
def test_a_block(parts, model, last, random):
    index, d = model.config.num_dual_blocks - 1 if last else 0, model.config.hidden_size
    context, image, vector = (random.standard_normal(shape) for shape in ((2, 5, d), (2, 6, d), (2, d)))
    ours = model.dual_blocks[index](*torch_of(context, image, vector))
    found = parts["transformer"].block(index, context, image, vector, None, 1)
    assert relative(found[1], ours[1]) < EXACT
    assert found[0] is ours[0] is None if last else relative(found[0], ours[0]) < EXACT


@pytest.mark.parametrize("settings", [
    None, SHIPPED["repulsion"], {"scale": 1e3, "iterations": 3},
    {"scale": 1e2, "iterations": 2, "blocks": "last"}, {"strength": 4.0, "iterations": 3},
    {"strength": 0.3, "iterations": 1, "branches": "conditional", "blocks": [1, 7], "solver": "gram"},
], ids=["none", "shipped", "the paper's", "last third", "strength 4", "one branch, two blocks"])  # fmt: skip
def test_the_transformer_with_every_kind_of_push(parts, model, settings, random):
    config, wide = model.config, (8, 4)  # not square, smaller than the position table
    shapes = ((6, config.latent_channels, *wide), (6, 9, config.context_dim), (6, config.pooled_dim))
    latent, context, pooled = (random.standard_normal(shape) for shape in shapes)
    ours = model(*torch_of(latent, np.zeros(6), context, pooled), groups=2,  # σ = 0, whose features are exact
                 repulsion=Repulsion(**settings) if settings else None)
    push = PortRepulsion(**settings) if settings else None
    assert relative(parts["transformer"].velocity(latent, 0.0, context, pooled, push, 2), ours) < EXACT


def test_the_features_of_a_noise_level(parts, random):
    network = parts["transformer"]
    network.conditioning(0.75, random.standard_normal((1, network.config["pooled_projection_dim"])))
    angles = 750 * 10_000 ** (-np.arange(128) / 128)
    # in float32 a frequency is off by up to 2e-7 of itself, at an angle of 750 that is 1.5e-4
    np.testing.assert_allclose(network.record["time_in.in"][0], np.r_[np.cos(angles), np.sin(angles)], atol=2e-4)


LENGTHS = pytest.mark.parametrize("length", [{"scale": 5.0}, {"strength": 0.5}], ids=["scale", "strength"])


@LENGTHS
def test_a_push_ends_where_the_paper_s_loop_ends(length, random):
    tokens = 1 + 0.1 * random.standard_normal((6, 4, 10))
    found, inside = PortRepulsion(iterations=8, **length).push(tokens, 2)
    loop = Repulsion(iterations=8, solver="autograd", **length).bind(0, 1, groups=2)(torch.from_numpy(tokens))
    # automatic differentiation over the tokens; cosines of 0.99 cost two digits of float64
    assert np.linalg.norm(found - loop.numpy()) < 1e-10 * np.linalg.norm(found - tokens)
    assert inside["mixing"].shape == (2, 3, 3)


def test_strength_is_the_length_of_a_push_of_one_step_relative_to_the_group(random):
    tokens = 1 + 0.1 * random.standard_normal((6, 4, 10))
    tokens[3:] *= 100
    found, _ = PortRepulsion(strength=1.5).push(tokens, 2)
    for group in (slice(3), slice(3, 6)):
        moved = np.linalg.norm((found - tokens)[group]) / np.linalg.norm(tokens[group])
        assert moved == pytest.approx(1.5, rel=1e-12)


def test_samples_that_all_coincide_stay(random):
    tokens = np.repeat(random.standard_normal((1, 3, 4)), 4, axis=0)
    assert (PortRepulsion(strength=2.0).push(tokens, 1)[0] == tokens).all()


@LENGTHS
def test_twins_move_alike_and_nothing_moves_a_zero(length, random):
    tokens = random.standard_normal((5, 3, 4))
    tokens[1], tokens[3] = tokens[0], 0
    found, _ = PortRepulsion(iterations=4, **length).push(tokens, 1)
    ours = repel(torch.from_numpy(tokens), length.get("scale"), 4, strength=length.get("strength"))
    assert relative(found, ours) < EXACT
    # the least eigenvalue is ε / B = 2e-5, of which a rounding of 1e-16 is 5e-12
    assert (found[3] == 0).all() and np.abs(found[1] - found[0]).max() < 1e-11 < np.abs(found[0] - tokens[0]).max()


@pytest.mark.parametrize("repelled", [False, True], ids=["base", "repelled"])
def test_the_pictures_are_ours(pipeline, inputs, repelled):
    parts, settings = load(FOLDER)
    settings |= {"steps": 6} | ({} if repelled else {"repulsion": None})
    found = paint(parts, inputs, **settings)["pixels"]
    ours = pipeline(PROMPT, 2, steps=6, noise=torch.from_numpy(inputs["noise"]),
                    repulsion=pipeline.defaults.repulsion if repelled else None)
    assert np.abs(found - np.stack(ours).astype(int)).max() <= 2


def test_without_guidance_and_with_a_later_start_of_the_push(pipeline, inputs):
    parts, settings = load(FOLDER)
    later = {"strength": 0.5, "iterations": 2, "start": 1, "steps": 1}
    settings |= {"steps": 3, "guidance": 0.5, "repulsion": PortRepulsion(**later)}
    found = paint(parts, inputs, **settings)["pixels"]
    ours = pipeline(PROMPT, 2, steps=3, noise=torch.from_numpy(inputs["noise"]), guidance=0.5,
                    repulsion=Repulsion(**later))
    assert np.abs(found - np.stack(ours).astype(int)).max() <= 2


@pytest.mark.parametrize(("images", "repulsion"), [(2, {}), (16, {"repulsion": {"strength": 4.0, "iterations": 3}})],
                         ids=["2", "16, strength 4"])
def test_it_passes_the_kit(changed, tmp_path, images, repulsion):
    folder = changed("sampling.json", **repulsion)
    prompts = [PROMPT, "a circle"] if images < 16 else [PROMPT]
    porting.write(tmp_path / "kit", str(folder), prompts, images, steps=2)
    kit = porting.Kit.read(tmp_path / "kit")
    parts, settings = load(folder)
    given = safetensors.read(tmp_path / "kit" / "kit.safetensors")
    given = {name: given[name] for name in ("clip_l.ids", "clip_g.ids", "t5.ids", "noise")}
    found = paint(parts, given, **settings | {"steps": 2})
    rows = porting.compare(kit, {name: torch.tensor(np.ascontiguousarray(x)) for name, x in found.items()})
    assert all(row.passed for row in rows), porting.report(rows)


def test_the_program_paints_what_the_readme_s_lines_prepare(changed, tmp_path, monkeypatch, pipeline):
    code = re.search(r"```python\n(.*?)```", (PORT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("starting_noise(0, 4,", "starting_noise(0, 2,"), {})
    folder = changed("sampling.json", steps=2)
    command = [sys.executable, "-m", "examples.numpy_port", tmp_path / "INPUTS.npz", tmp_path / "out",
               "--checkpoint", folder, "--tensors", tmp_path / "tensors.npz"]
    subprocess.run(command, check=True, cwd=PORT.parents[1])
    for batch, repulsion in (("base", None), ("repelled", pipeline.defaults.repulsion)):
        ours = pipeline("a circle", 2, steps=2, repulsion=repulsion)
        for i, picture in enumerate(ours):
            with Image.open(tmp_path / "out" / f"{batch}-{i}.ppm") as found:
                assert np.abs(np.asarray(found, int) - np.asarray(picture, int)).max() <= 2
    assert (np.load(tmp_path / "tensors.npz")["pixels"][1] == np.asarray(found)).all()


@pytest.mark.parametrize("file,entry,value", [
    ("transformer/config.json", "_class_name", "FluxTransformer2DModel"),
    ("transformer/config.json", "dual_attention_layers", [0]), ("transformer/config.json", "qk_norm", None),
    ("text_encoder/config.json", "architectures", ["CLIPTextModel"]),
    ("text_encoder_3/config.json", "feed_forward_proj", "relu"), ("vae/config.json", "use_post_quant_conv", True),
])  # fmt: skip
def test_what_it_does_not_do_is_refused(changed, file, entry, value):
    folder = changed(file, **{entry: value})
    match = f"{re.escape(str(folder / file))} has {entry} .*supports only .*use the project"
    with pytest.raises(ValueError, match=match):
        load(folder)


@pytest.mark.parametrize("settings", [
    {"scale": 1.0, "objective": "dpp"}, {"strength": 0.5, "solver": "autograd"}, {"scale": 1.0, "strength": 0.5},
    {"iterations": 2}, {"scale": 1.0, "speed": 2},
])  # fmt: skip
def test_other_pushes_are_refused(changed, settings):
    with pytest.raises(ValueError, match="beyond it, use the project"):
        load(changed("sampling.json", repulsion=settings))


def test_damaged_and_strange_files_are_refused(tmp_path):
    whole = (FOLDER / "text_encoder" / "model.safetensors").read_bytes()
    for name, content in {"cut": whole[:-1], "short": whole[:5], "text": b"version 1: a pointer"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
            safetensors.read(tmp_path / name)
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "float8")
    with pytest.raises(ValueError, match="float8 is not a whole safetensors file of .*F8_E4M3"):
        safetensors.read(tmp_path / "float8")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
