"""A kit of tiny-sd3 and one of a small random FLUX.1, and the pipelines that the tests break."""

import json
import sys
from pathlib import Path

import pytest
import torch

from porting import Kit, write
from sampler import Pipeline

sys.path.append(str(Path(__file__).parents[1] / "sampler"))
from small_pipelines import flux, saved  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a kit of a single step."""
    folder = tmp_path_factory.mktemp("kits") / "tiny"
    write(folder, "tiny-sd3", "a circle", steps=1)
    return folder


@pytest.fixture(scope="session")
def kit(tiny):
    return Kit.read(tiny)


@pytest.fixture
def pipeline():
    """One that a test may break."""
    return Pipeline.load("tiny-sd3", dtype=torch.float32)


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
    write(folder, str(flux_model))
    return Kit.read(folder)


@pytest.fixture
def flux_pipeline(flux_model):
    return Pipeline.load(flux_model, dtype=torch.float32)
