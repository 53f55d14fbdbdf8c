"""Gram solver against the paper's loop at FLUX.1 size: `python -m benchmarks.solver`.

4 samples of 512 × 3072 float32 tokens, M = 50. Reference: the loop in float64. Medians of the runs, interleaved.
"""

import argparse
import statistics
import time

import torch

from repulsion.objectives import OBJECTIVES
from repulsion.solvers import ascend_autograd, ascend_gram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1e6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    vectors = (torch.randn(1, 1, 512 * 3072) + 0.03 * torch.randn(1, 4, 512 * 3072)).to(args.device)
    settings = (args.scale, 50, OBJECTIVES["vendi"], 1e-4)

    reference = ascend_autograd(vectors.double(), *settings)
    length = (reference - vectors).norm()
    solvers = {"loop, float32": ascend_autograd, "Gram": ascend_gram}
    times, errors = {name: [] for name in solvers}, {}
    for run in range(args.runs + 1):  # the first warms up
        for name, solve in solvers.items():
            start = time.perf_counter()
            found = solve(vectors, *settings)
            errors[name] = ((found.double() - reference).norm() / length).item()  # waits for the device, too
            if run:
                times[name].append(time.perf_counter() - start)
    print(f"displacement: {(length / vectors.double().norm()).item():.1%} of the tokens' length")
    print("| solver | relative error of the displacement | median time | ratio |\n|---|---|---|---|")
    slowest = statistics.median(times["loop, float32"])
    for name in solvers:
        median = statistics.median(times[name])
        print(f"| {name} | {errors[name]:.1e} | {1000 * median:.0f} ms | {slowest / median:.0f} × |")


if __name__ == "__main__":
    main()
