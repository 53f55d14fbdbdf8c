"""The JAX port: it passes the kit, whole and fed, and its pictures are ours."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import porting
import weights
from sampler import Pipeline

jax = pytest.importorskip("jax")

import examples.jax_port  # noqa: E402
from examples.jax_port.sampler import load, paint  # noqa: E402
from examples.jax_port.text import tokenize  # noqa: E402

PORT, FOLDER = Path(examples.jax_port.__file__).parent, weights.BUNDLED["tiny-flux"]
PROMPTS = ["a small green star left of a ring", "a circle"]


@pytest.fixture(scope="module")
def network():
    return load(FOLDER)[0]


def painted(network, kit, fed, **push):
    settings = load(FOLDER)[1]
    settings |= {"steps": len(kit.tensors["sigmas"]) - 1}
    settings["repulsion"] = settings["repulsion"].__class__(**vars(settings["repulsion"]) | push)
    given = {name: x.numpy() for name, x in kit.tensors.items()}
    found = paint(network, given, given if fed else {}, checked=True, **settings)
    return {name: torch.from_numpy(np.array(x)) for name, x in found.items()}


@pytest.mark.parametrize(("images", "push"), [(2, {}), (16, {"strength": 4.0, "iterations": 3})],
                         ids=["2", "16, strength 4"])
def test_it_passes_the_kit(tmp_path, network, images, push):
    prompts = PROMPTS if images < 16 else PROMPTS[:1]
    porting.write(tmp_path / "kit", "tiny-flux", prompts, images, steps=2, **push)
    kit = porting.Kit.read(tmp_path / "kit")
    for fed in (False, True) if images == 2 else (False,):
        rows = porting.compare(kit, painted(network, kit, fed, **push), fed)
        assert all(row.passed for row in rows), porting.report(rows, fed)


def test_its_pictures_are_ours(network):
    pipeline, settings = Pipeline.load("tiny-flux", dtype=torch.float32), load(FOLDER)[1] | {"steps": 4}
    noise = np.random.default_rng(1).standard_normal((4, 16, 16, 16), np.float32)
    found = np.asarray(paint(network, tokenize(FOLDER, PROMPTS) | {"noise": noise}, {}, **settings)["pixels"])
    for i, prompt in enumerate(PROMPTS):
        ours = pipeline(prompt, 2, steps=4, noise=torch.from_numpy(noise[2 * i : 2 * i + 2]),
                        repulsion=pipeline.defaults.repulsion)
        assert np.abs(found[2 * i : 2 * i + 2] - np.stack(ours).astype(int)).max() <= 2


def test_it_is_short_and_its_head_says_what_to_install():
    sources = {file.name: file.read_text(encoding="utf-8") for file in PORT.glob("*.py")}
    assert sum(len(source.splitlines()) for source in sources.values()) < 450
    named = re.search(r"^pip install (.*?)\"\"\"$", sources["__init__.py"], re.MULTILINE)[1].split()
    used = set()
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            used |= {name.split(".")[0] for name in names} - sys.stdlib_module_names
    brought = {"numpy": "jax", "PIL": "pillow"}  # numpy comes with jax; transformers reads T5's with sentencepiece
    assert {brought.get(name, name) for name in used} | {"sentencepiece"} == {*named}


def test_the_program_paints_a_kit_and_pictures(tmp_path):
    command = [sys.executable, "-m", "examples.jax_port", tmp_path / "out", "--prompt", "a circle", "--images", "1"]
    subprocess.run(command, check=True, cwd=PORT.parents[1])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["0.png"]
