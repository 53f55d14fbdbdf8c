"""A kit of tiny-sd3 (repulsion by strength) and one of a small random FLUX.1 (by scale), and pipelines to break."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import weights
from porting import Kit, Run, write
from sampler import Pipeline

sys.path.append(str(Path(__file__).parents[1] / "sampler"))
from small_pipelines import flux, saved  # noqa: E402

PROMPTS = ["a circle", "a small green star"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny-sd3 with repulsion of our choice, whatever the bundled checkpoint's default is."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(weights.resolve("tiny-sd3"), folder)
    sampling = json.loads((folder / "sampling.json").read_text())
    sampling["repulsion"] = {"strength": 1.5, "iterations": 3, "steps": 1}
    (folder / "sampling.json").write_text(json.dumps(sampling))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory):
    """The folder of a kit of a single step."""
    folder = tmp_path_factory.mktemp("kits") / "tiny"
    write(folder, str(tiny_model), PROMPTS, steps=1)
    return folder


@pytest.fixture(scope="session")
def kit(tiny):
    return Kit.read(tiny)


@pytest.fixture(scope="session")
def run(tiny_model):
    return Run.of(Pipeline.load(tiny_model), str(tiny_model), PROMPTS, steps=1)


@pytest.fixture
def pipeline(tiny_model):
    """One that a test may break."""
    return Pipeline.load(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="session")
def flux_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small-flux"
    saved(flux(), folder)
    push = {"scale": 100.0, "iterations": 3, "steps": 1}
    (folder / "sampling.json").write_text(json.dumps({"steps": 2, "guidance": 3.5, "height": 32, "width": 48,
                                                      "repulsion": push}))
    return folder


@pytest.fixture(scope="session")
def flux_kit(flux_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kits") / "flux"
    write(folder, str(flux_model), PROMPTS)
    return Kit.read(folder)


@pytest.fixture(scope="session")
def flux_run(flux_model):
    return Run.of(Pipeline.load(flux_model), str(flux_model), PROMPTS)


@pytest.fixture
def flux_pipeline(flux_model):
    return Pipeline.load(flux_model, dtype=torch.float32)
