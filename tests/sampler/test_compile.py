"""Compiled blocks: the same latents, one graph for all blocks of a kind, pushes among them."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from repulsion import Repulsion
from sampler import Pipeline
from sampler.parts import gelu_by_sigmoid


@pytest.fixture
def graphs(monkeypatch):
    """The number of graphs since the test began. They are captured as always, and run as they are: generating C++ of
    them takes a minute and is torch's own affair."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(("gelu", "bound"), [
    (partial(F.gelu, approximate="tanh"), 1e-6),  # three steps in float32, whose operations are the same
    (gelu_by_sigmoid, 2e-5),  # rounded differently, and guidance 6 multiplies that
])
@pytest.mark.parametrize(("name", "kinds"), [("tiny-sd3", 2), ("tiny-flux", 2)])  # SD3's last block has no context
def test_blocks_of_a_kind_share_a_graph_and_paint_the_same(name, kinds, gelu, bound, graphs, monkeypatch):
    monkeypatch.setattr("sampler.parts.gelu_by_sigmoid", gelu)
    call = {"prompt": "a circle", "images": 2, "steps": 3, "decode": False}
    compiled, plain = Pipeline.load(name, compile=True), Pipeline.load(name)
    for repulsion in (None, Repulsion(strength=1.0, steps=2, blocks=(0, 7))):
        found, expected = (pipeline(**call, repulsion=repulsion)[0] for pipeline in (compiled, plain))
        assert (found - expected).norm() / expected.norm() < bound
    assert graphs() == kinds and not counters["graph_break"]


def test_the_gelu_of_compiled_blocks_is_the_tanh_form_and_that_of_others_torch_s(graphs):
    x = torch.linspace(-40, 40, 10_001, dtype=torch.float64)
    found, wanted = torch.compile(gelu_by_sigmoid)(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
    assert graphs() == 1 and not torch.equal(found, wanted) and torch.equal(gelu_by_sigmoid(x), wanted)


def test_blocks_that_are_copied_one_by_one_are_not_compiled():
    with pytest.raises(ValueError, match="compile needs blocks that stay on the device"):
        Pipeline.load("tiny-sd3", compile=True, offload="blocks")
