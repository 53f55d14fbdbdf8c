"""What a denoising step costs on paper: `python -m benchmarks.scale`.

Operations are counted by PyTorch at full size on the meta device, where nothing is computed: 2 for each multiplication
and addition in a matrix product or an attention. The push, and what ranks send for it, follow from the formulas of
docs/scale.md. Pictures are 1024 × 1024; a group is split evenly over the ranks.
"""

import argparse
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdit import MMDiT, MMDiTConfig
from mmdit.meta import on_meta
from weights import PUBLIC

from .memory import context_tokens, text_encoders
from .solver import show

MODELS = ("flux1-dev", "sd3.5-large", "flux2-klein-4b")
GROUPS = (4, 8, 16, 64)
H100 = {"operations": 0.5 * 989e12, "link": 450e9}  # a second: half of its bfloat16 peak; bytes by NVLink, each way


@cache
def step_operations(config: MMDiTConfig, n: int, m_side: int, groups: int = 1) -> int:
    """Of one forward pass of the transformer for `groups` pictures: n context and m_side² image tokens each."""
    model, side = on_meta(MMDiT, config), m_side * config.patch_size

    def empty(*shape):
        return torch.empty(groups, *shape, device="meta")

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(empty(config.latent_channels, side, side), empty(), empty(n, config.context_dim),
              empty(config.pooled_dim) if config.pooled_dim else None, empty() if config.guidance_embedding else None)
    return counter.get_total_flops()


def pushed_tokens(config: MMDiTConfig, n: int, m: int) -> int:
    """Tokens of a sample in all pushes of a step: the context in dual-stream blocks, all in single-stream blocks. The
    last block of SD3 has no context to push."""
    return (config.num_dual_blocks - config.context_ends_early) * n + config.num_single_blocks * (n + m)


def push_operations(config: MMDiTConfig, n: int, m: int, samples: int) -> int:
    """Of all pushes of a step: the Gram matrix and the mixing, each 2 B² N D."""
    return 4 * samples**2 * pushed_tokens(config, n, m) * config.hidden_size


def exchanged(samples: int, features: int, ranks: int, itemsize: int = 2) -> float:
    """Bytes that a rank sends of its B / R samples in a push: the features of the other ranks, there and back."""
    return 2 * samples / ranks * features * itemsize * (ranks - 1) / ranks


def push_bytes(config: MMDiTConfig, n: int, m: int, samples: int, ranks: int) -> int:
    """What each rank sends for all pushes of a step: features, and the sums of its Gram matrices, B² numbers of 8 bytes
    each, to one rank and back."""
    pushes = config.num_blocks - config.context_ends_early
    features = exchanged(samples, pushed_tokens(config, n, m) * config.hidden_size, ranks)
    return round(features + 2 * pushes * samples**2 * 8 * (ranks - 1) / ranks)


def row(name: str, samples: int, ranks: int) -> list[str]:
    config, settings = PUBLIC[name].config, PUBLIC[name].settings
    n, side = context_tokens(config, text_encoders(config, settings.prompt_tokens)), 1024 // 16
    branches = 2 if not config.guidance_embedding and (settings.guidance or 0) > 1 else 1
    step = samples * branches * step_operations(config, n, side)
    push = branches * push_operations(config, n, side**2, samples)
    sent = branches * push_bytes(config, n, side**2, samples, ranks) if ranks > 1 else 0
    seconds, messages = step / ranks / H100["operations"], sent / H100["link"]
    return [name, str(samples), f"{step / 1e12:.0f}", f"{100 * push / step:.3f}", f"{sent / 1e9:.2f}",
            f"{1000 * seconds:.0f}", f"{1000 * messages:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    for ranks in args.ranks:
        print(f"{ranks} × H100, guidance as published:\n")
        columns = ["checkpoint", "group", "step, 10¹² operations", "pushes, % of it", "sent a rank, GB", "step, ms",
                   "messages, ms"]
        show(" | ".join(columns), [row(name, group, ranks) for name in MODELS for group in GROUPS])


if __name__ == "__main__":
    main()
