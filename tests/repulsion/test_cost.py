"""A push at its true cost: what it holds in memory, when it waits for the device, and what it does when compiled."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.solver import Allocated
from mmdit import MMDiT, MMDiTConfig
from repulsion import Repulsion, repel


def tokens(b=4, n=64, d=256, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(1, n, d) + 0.1 * torch.randn(b, n, d)).to(dtype)


class Calls(TorchDispatchMode):
    """The names of the operations that run while it is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [{}, {"last_group": True, "groups": 2}, {"first": 300}], ids=str)
def test_a_push_holds_at_most_2_2_times_its_input(dtype, part):
    batch = tokens(8, 512, 1024, dtype)
    with Allocated() as made:
        result = repel(batch, None, 5, strength=1.0, **part)
    assert 2 < made.most / batch.nbytes < 2.2  # the input, the result, and what is widened at a time
    assert result.shape == batch.shape


def test_nothing_but_the_gram_matrix_leaves_the_device():
    batch = tokens(groups := 8)
    with Calls() as calls:
        repel(batch, 5.0, 10, groups=groups // 4)
    # reading a number (`item`, a truth value) would be a copy and a wait of its own
    assert not [name for name in calls.names if "_local_scalar_dense" in name or "is_nonzero" in name]


def test_the_default_device_does_not_matter():
    batch = tokens()
    expected = repel(batch, None, 3, strength=1.0)
    with torch.device("meta"):  # what set_default_device sets, for a while: a device without numbers
        found = repel(batch, None, 3, strength=1.0)
        loop = repel(batch, None, 3, strength=1.0, solver="autograd")
    assert torch.equal(found, expected)
    torch.testing.assert_close(loop, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"strength": 1e6, "scale": None}, {"scale": 1e300}], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_push_out_of_range_says_so_itself(settings, iterations):
    with pytest.raises(ValueError, match="the push exceeds the range of torch.float16: lower the strength or scale"):
        repel(tokens(dtype=torch.float16), iterations=iterations, **settings)
    assert torch.isfinite(repel(tokens(dtype=torch.float16), None, 1, strength=4.0)).all()


def test_tokens_whose_norm_alone_exceeds_the_range_are_pushed():
    batch = 400 * tokens(dtype=torch.float16)  # norms near 60,000, numbers near 1,000
    assert batch.double().flatten(1).norm(dim=1).min() > 4e4
    pushed = repel(batch, None, 1, strength=2.0)
    assert pushed.double().flatten(1).norm(dim=1).max() > 65504
    wide = repel(batch.double(), None, 1, strength=2.0)
    torch.testing.assert_close(pushed.double(), wide, rtol=1e-3, atol=0.1)


def test_first_and_last_group_select_what_is_pushed():
    batch = tokens(8, 6, 16)
    pushed = repel(batch, 5.0, 4, groups=2, last_group=True, first=2)
    assert torch.equal(pushed[:4], batch[:4]) and torch.equal(pushed[4:, 2:], batch[4:, 2:])
    torch.testing.assert_close(pushed[4:, :2], repel(batch[4:, :2], 5.0, 4), rtol=1e-6, atol=1e-7)


def test_a_strided_slice_is_pushed_as_its_copy_is():
    joint = tokens(4, 12, 32)
    assert torch.equal(repel(joint[:, :5], 5.0, 4), repel(joint[:, :5].contiguous(), 5.0, 4))


SIZES = {"hidden_size": 32, "num_heads": 2, "latent_channels": 4, "context_dim": 24, "pooled_dim": 20}
CONFIGS = [
    MMDiTConfig(**SIZES, num_dual_blocks=2, num_single_blocks=2, rope_axes=(4, 6, 6)),
    MMDiTConfig(**SIZES, num_dual_blocks=3, position="table", position_table_size=8),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["rope", "table"])
def test_a_compiled_model_runs_with_repulsion_and_is_whole_without(config):
    torch.manual_seed(0)
    model = MMDiT(config).requires_grad_(False)
    inputs = {"latent": torch.randn(3, 4, 4, 6), "sigma": torch.full((3,), 0.9), "context": torch.randn(3, 5, 24),
              "pooled": torch.randn(3, 20)}
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(model, backend=count, fullgraph=True)  # raises where the graph breaks
    torch.testing.assert_close(whole(**inputs), model(**inputs))
    assert len(graphs) == 1
    torch._dynamo.reset()
    push = Repulsion(strength=1.0, iterations=2, blocks=(0,))
    compiled = torch.compile(model, backend=count)
    torch.testing.assert_close(compiled(**inputs, repulsion=push), model(**inputs, repulsion=push))
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert not any("linalg" in name or "double" in name for name in called)  # the push itself is not traced
    torch._dynamo.reset()


def test_bind_gives_the_plain_push_outside_of_compilation():
    push = Repulsion(strength=1.0).bind(0, 4)
    assert isinstance(push, partial) and push.func is repel  # no wrapper, and no compiler to import


def test_an_empty_part_is_left_alone():
    batch = tokens(4, 6, 16)
    assert repel(batch, 5.0, 2, first=0) is batch
