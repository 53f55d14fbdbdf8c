"""What ranks send and hold: `python -m benchmarks.ranks [--ranks 2]`, on Linux.

Bytes: pushes of tokens as many and as wide as FLUX.1's and SD3.5's, what the loopback device transmitted for each, and
the formula of `sampler.ranks`. Memory: a forward pass of a transformer of 1.7 billion parameters in float32, from
bfloat16 zeros in a sparse file; the most memory of its own (RssAnon) beyond that of the imports that one process holds,
and each rank with the parameters spread over them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from mmdit import MMDiTConfig
from repulsion import Repulsion
from sampler.parts import load_sharded
from sampler.ranks import joined, leave, shares
from weights import open_part
from weights.detect import find_parts

from .loading import anonymous, most_anonymous, sparse_transformer
from .scale import exchanged

PUSHES = [  # name, images, branches, tokens, features, dtype
    ("FLUX.1, context", 4, 1, 512, 3072, torch.bfloat16),
    ("FLUX.1, single stream at 512²", 4, 1, 1536, 3072, torch.bfloat16),
    ("SD3.5-large, both branches", 5, 2, 333, 2432, torch.bfloat16),
]
CONFIG = MMDiTConfig(hidden_size=1152, num_heads=9, num_dual_blocks=19, num_single_blocks=38)  # the blocks of FLUX.1


def sent() -> int:
    """Bytes that the loopback device has transmitted."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def bytes_of_pushes(ours, repeats: int = 10) -> None:
    """What all ranks send in one push, by the formula and measured."""
    if not ours.rank:
        print("| push | formula | sent | ratio |\n|---|---|---|---|")
    for name, images, groups, n, d, dtype in PUSHES:
        split = ours.split(images, Repulsion(strength=1.0))["repulsion"]
        push, own = split.bind(0, 1, groups), shares(images, ours.size)[ours.rank]
        tokens = torch.randn(groups * own, n, d).to(dtype)
        push(tokens)
        dist.barrier()
        before = sent()
        for _ in range(repeats):
            push(tokens)
        dist.barrier()
        measured = (sent() - before) / repeats / 2**20
        formula = ours.size * exchanged(groups * images, n * d, ours.size, dtype.itemsize) / 2**20
        if not ours.rank:
            print(f"| {name}, {images} images | {formula:.2f} MiB | {measured:.2f} MiB | {measured / formula:.3f} |")


def peak(path: Path, ranks: int) -> float:
    """GiB of the most memory that loading and a forward pass take of this process."""
    (part,) = find_parts(path, ["transformer"], "transformer")
    given, before = (torch.float32, torch.device("cpu"), False), anonymous()
    with torch.no_grad(), most_anonymous() as most:
        model = load_sharded(open_part(part, CONFIG), *given) if ranks > 1 else open_part(part, CONFIG).load(*given)
        model(torch.zeros(1, 16, 8, 8), torch.ones(1), torch.zeros(1, 8, CONFIG.context_dim), torch.zeros(1, 768))
    return (most[-1] - before) / 2**30


def start(ranks: int, file: Path) -> None:
    """This file again, in so many processes."""
    print(flush=True, end="")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    subprocess.run([sys.executable, *launch, "-m", "benchmarks.ranks", "--file", str(file)], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # of the processes that it starts
    args = parser.parse_args()
    if args.file is None:
        with tempfile.TemporaryDirectory() as folder:
            file = sparse_transformer(Path(folder) / "model.safetensors", CONFIG)
            start(1, file)
            start(args.ranks, file)
        return
    with joined() as ours:
        if ours.size > 1:
            bytes_of_pushes(ours)
        memory = [None] * ours.size
        mine = peak(args.file, ours.size)
        if ours.size > 1:
            dist.all_gather_object(memory, mine)
        if not ours.rank:
            most = ", ".join(f"{gib:.2f} GiB" for gib in (memory if ours.size > 1 else [mine]))
            print(f"peak memory of a forward pass, {ours.size} process(es): {most}")
    leave()


if __name__ == "__main__":
    main()
