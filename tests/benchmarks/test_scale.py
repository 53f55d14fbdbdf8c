"""The operations of `benchmarks.scale` against closed forms, and its table against the page."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale import push_bytes, push_operations, pushed_tokens, row, step_operations
from mmdit import MMDiTConfig
from repulsion import repel

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
FLUX = MMDiTConfig(hidden_size=96, num_heads=3, num_dual_blocks=2, num_single_blocks=3, context_dim=40, pooled_dim=24,
                   rope_axes=(8, 12, 12), guidance_embedding=True)
SD3 = MMDiTConfig(hidden_size=96, num_heads=3, num_dual_blocks=4, context_dim=40, pooled_dim=24, position="table",
                  position_table_size=16)
FLUX2 = MMDiTConfig(hidden_size=96, num_heads=3, num_dual_blocks=2, num_single_blocks=3, latent_channels=32,
                    patch_size=1, context_dim=40, pooled_dim=None, mlp_ratio=3.0, rope_axes=(8, 8, 8, 8), bias=False,
                    gated_mlp=True, shared_modulation=True, reference_step=10)


def by_hand(config, n, m):
    """Multiplications of the matrices, by the figure of each model, times 2."""
    d, mlp, gated = config.hidden_size, config.mlp_width, 1 + config.gated_mlp
    attention = 2 * (n + m) ** 2 * d  # q kᵀ and the weighted sum of v
    stream = 4 * d * d + (gated + 1) * d * mlp  # q, k, v, out; MLP: a token
    total = m * config.patch_dim * d * 2 + n * config.context_dim * d  # first and last layer
    total += config.num_dual_blocks * (attention + (n + m) * stream)
    if config.context_ends_early:  # SD3's last block has no output of the context
        total -= n * (d * d + (gated + 1) * d * mlp)
    total += config.num_single_blocks * (attention + (n + m) * (3 * d * d + gated * d * mlp + (d + mlp) * d))
    vectors = (256 * d + d * d) * (1 + config.guidance_embedding) + 2 * d * d  # σ, guidance; final modulation
    vectors += config.pooled_dim * d + d * d if config.pooled_dim else 0
    parts = 15 if config.shared_modulation else (
        config.num_dual_blocks * 12 + config.num_single_blocks * 3 - 4 * config.context_ends_early)
    return 2 * (total + vectors + parts * d * d)


@pytest.mark.parametrize("config", [FLUX, SD3, FLUX2], ids=["flux", "sd3", "flux2"])
def test_a_step_takes_the_operations_of_its_matrices(config):
    n, side = 10, 6
    assert step_operations(config, n, side) == by_hand(config, n, side**2)
    assert step_operations(config, n, side, groups=3) == 3 * by_hand(config, n, side**2)


def test_a_push_takes_the_operations_of_the_formula():
    samples, n, m, total = 5, 7, 20, 0
    for count in [n] * FLUX.num_dual_blocks + [n + m] * FLUX.num_single_blocks:
        with FlopCounterMode(display=False) as counter:
            repel(torch.rand(samples, count, FLUX.hidden_size), None, 1, strength=1.0)
        total += counter.get_total_flops()
    assert total == push_operations(FLUX, n, m, samples)


def test_ranks_send_what_they_hold_of_others_features_there_and_back():
    samples, ranks, n, m = 8, 4, 7, 20
    tokens = 2 * n + 3 * (n + m)
    assert pushed_tokens(FLUX, n, m) == tokens
    exchanged = 2 * 2 * (samples // ranks) * tokens * FLUX.hidden_size * (ranks - 1) // ranks
    assert push_bytes(FLUX, n, m, samples, ranks) == exchanged + 5 * 2 * samples**2 * 8 * (ranks - 1) // ranks


def test_rows_of_the_page_are_what_the_script_prints():
    pattern = r"^\| (sd3\.5-large) \| (4|64) \| ((?:[^|]+ \| ){4}[^|]+) \|$"  # not the rows that were measured
    rows = re.findall(pattern, PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == 4
    for i, (name, samples, cells) in enumerate(rows):
        assert row(name, int(samples), (1, 8)[i // 2]) == [name, samples, *cells.split(" | ")]
