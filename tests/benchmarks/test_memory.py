"""The counter of memory against what torch's allocator on the CPU allocated, and against closed forms."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import IMAGES, MARGIN, build, count, needs
from mmdit import (
    Autoencoder,
    AutoencoderConfig,
    ClipConfig,
    ClipTextEncoder,
    DecoderConfig,
    MMDiT,
    MMDiTConfig,
    T5Config,
    T5Encoder,
    TextDecoder,
)
from mmdit.float8 import keep_in_float8
from mmdit.layers import MLP
from repulsion import repel
from training.loop import cpu_has_bfloat16

ROOT = Path(__file__).parents[2]
SMALL = {"num_dual_blocks": 3, "context_dim": 64, "pooled_dim": 32}
FLUX = MMDiTConfig(hidden_size=256, num_heads=2, num_single_blocks=2, guidance_embedding=True, **SMALL)
SD3 = MMDiTConfig(hidden_size=128, num_heads=2, position="table", position_table_size=32, **SMALL)
FLUX2 = MMDiTConfig(hidden_size=128, num_heads=1, num_dual_blocks=2, num_single_blocks=2, latent_channels=32,
                    patch_size=1, context_dim=64, pooled_dim=None, mlp_ratio=3.0, rope_axes=(32, 32, 32, 32),
                    bias=False, gated_mlp=True, shared_modulation=True, reference_step=10)
DECODER = DecoderConfig(vocab_size=50, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
                        layers=(1, 2, 3))
CLIP = ClipConfig(vocab_size=50, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2, end_token=0)
T5 = T5Config(vocab_size=50, hidden_size=64, head_dim=16, intermediate_size=256, num_layers=2, num_heads=4)
VAE = AutoencoderConfig(channels=(32, 64))


@pytest.fixture(autouse=True)
def one_thread():
    """A kernel of the CPU takes scratch of its own for every thread; what is counted here must not depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def allocated(call):
    """The most bytes that the CPU's allocator had allocated at one time, kernels' own temporaries among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.no_grad():
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def run(model, device, samples):
    """A forward pass of any of the networks."""
    def numbers(*shape, dtype=torch.float32):
        return torch.zeros(shape, device=device, dtype=dtype)

    if isinstance(model, Autoencoder):
        return model.decode(numbers(samples, 16, 32, 32))
    if isinstance(model, TextDecoder):
        ids = numbers(samples, 40, dtype=torch.int64)
        return model(ids, ids == 0)
    if not isinstance(model, MMDiT):
        return model(numbers(samples, 40, dtype=torch.int64))
    guidance = numbers(samples) if model.config.guidance_embedding else None
    texts = numbers(samples, 30, 64), numbers(samples, 32) if model.config.pooled_dim else None
    return model(numbers(samples, model.config.latent_channels, 32, 32), numbers(samples), *texts, guidance)


@pytest.mark.parametrize("network, config, dtype, workspace", [
    *((network, config, dtype, 0) for dtype in (torch.float32, torch.bfloat16)
      for network, config in ((MMDiT, FLUX), (MMDiT, SD3), (MMDiT, FLUX2), (T5Encoder, T5), (ClipTextEncoder, CLIP))),
    (TextDecoder, DECODER, torch.float32, 0),
    (TextDecoder, DECODER, torch.bfloat16, 0.4),  # within attention the mask becomes numbers, which count for so little
    (Autoencoder, VAE, torch.float32, 0.25),  # what convolutions use within themselves is not counted
])
def test_the_count_on_meta_is_what_the_allocator_of_the_cpu_allocated(network, config, dtype, workspace):
    on_meta, on_cpu = build(network, config).to(dtype), network(config).to(dtype).requires_grad_(False)
    on_meta._check = lambda *ids: None
    if dtype is torch.bfloat16 and not cpu_has_bfloat16():
        workspace = max(workspace, 0.5)  # such a processor's products have buffers of their own
    for samples in (1, 3):
        weights, beside = count(on_meta, lambda n=samples: run(on_meta, "meta", n))
        assert weights == sum(tensor.nbytes for tensor in on_cpu.state_dict().values())
        real = allocated(lambda n=samples: run(on_cpu, "cpu", n))
        assert 0 <= real - beside <= 10_000 + workspace * beside  # a kernel takes 8 KB where tokens are this few


def test_a_push_takes_what_it_takes_on_the_cpu(monkeypatch):
    least = import_module("repulsion.repel").LEAST
    monkeypatch.setitem(least, "meta", least["cpu"])  # otherwise it has the pieces of a GPU
    on_meta, on_cpu = (torch.zeros(6, 400, 256, dtype=torch.bfloat16, device=name) for name in ("meta", "cpu"))
    on_cpu += torch.rand(on_cpu.shape)
    _, most = count(nn.Identity(), lambda: repel(on_meta, None, 1, strength=1.0, groups=2))
    real = allocated(lambda: repel(on_cpu, None, 1, strength=1.0, groups=2))
    assert most == pytest.approx(on_meta.nbytes + real, rel=1e-3)  # on the CPU the tokens were there before


def test_what_is_known_in_closed_form():
    m, d = 100, 64
    tokens = m * d * 2  # bytes
    mlp = MLP(d, 4 * d, d, nn.GELU()).to("meta", torch.bfloat16)
    x = torch.empty(1, 1, m, d, device="meta", dtype=torch.bfloat16)
    assert count(mlp, lambda: mlp(x.clone())) == (2 * (8 * d * d + 5 * d), (1 + 4 + 4) * tokens)  # before, after GELU

    kept = keep_in_float8(nn.Linear(d, 5 * d, bias=False), torch.float8_e4m3fn, scaled=False)
    assert count(kept, lambda: kept(x.clone())) == (5 * d * d, tokens + 2 * 5 * d * d + 5 * tokens)  # widened meanwhile

    def attention():
        return F.scaled_dot_product_attention(x.clone(), x.clone(), x.clone())
    assert count(nn.Identity(), attention) == (0, 4 * tokens)  # no m × m matrix


@pytest.mark.parametrize("float8", [False, True])
def test_streamed_blocks_take_the_room_of_one(float8):
    whole, streamed = (build(MMDiT, SD3, float8, streamed=stream) for stream in (False, True))
    weights, beside = count(whole, lambda: run(whole, "meta", 4))
    left, with_block = count(streamed, lambda: run(streamed, "meta", 4))
    of_blocks = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in whole.dual_blocks]
    assert left == weights - sum(of_blocks)
    assert with_block == beside + max(of_blocks)


def documented():
    """The rows of docs/memory.md by checkpoint and weights."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (bfloat16|float8 kept) \| (.*) \|$", page, flags=re.M)
    return {(name, weights): [float(cell) for cell in cells.split(" | ")] for name, weights, cells in rows}


def test_a_row_of_the_page_is_what_the_script_counts():
    row, counted = documented()["sd3-medium", "bfloat16"], needs("sd3-medium", float8=False, images=IMAGES[-1:])
    assert row[len(IMAGES) - 1 :: len(IMAGES)] == [round(gib, 1) for gib in counted]


def test_the_command_for_a_card_of_16_gb_fits_it():
    (images,) = re.findall(r"on a card of 16 GB \|.* --images (\d) .*--keep-float8 --offload parts` \|",
                           (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8"))
    parts = documented()["flux1-dev", "float8 kept"][len(IMAGES) : 2 * len(IMAGES)]
    assert parts[IMAGES.index(int(images))] + MARGIN < 16
