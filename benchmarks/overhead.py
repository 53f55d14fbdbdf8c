"""What repulsion costs in whole runs of tiny-sd3.

`python -m benchmarks.overhead`. Runs with and without alternate, so that a noisy machine disturbs both alike; the
share is the median of the paired ratios. `--peak` adds the peak memory of the main job, in a process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

from repulsion import Repulsion
from sampler import Pipeline


def settings(own: Repulsion) -> dict[str, Repulsion]:
    """What is measured: the settings that ship, and the paper's numbers of steps in all blocks and both branches."""
    paper = Repulsion(strength=1.0, iterations=50, steps=1)
    return {"as shipped": own, "M = 50 in one step": paper,
            "M = 100 in four steps": replace(paper, iterations=100, steps=4)}


def paired(pipeline: Pipeline, images: int, runs: int, repulsion: Repulsion) -> tuple[float, float]:
    """Median seconds without repulsion, and the median of the paired ratios less 1."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for run in range(runs + 1):
        for repelled, found in times.items():
            start = time.perf_counter()
            pipeline("a circle", images, seed=run, repulsion=repulsion if repelled else None)
            if run:  # the first warms up
                found.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    return statistics.median(times[False]), statistics.median(ratios) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--peak", action="store_true", help="run the main job too: its time and peak memory")
    args = parser.parse_args()
    pipeline = Pipeline.load(args.model)
    print("| repulsion | images | without | with it |\n|---|---|---|---|")
    for name, repulsion in settings(pipeline.defaults.repulsion).items():
        for images in (4, 8):
            base, share = paired(pipeline, images, args.runs, repulsion)
            print(f"| {name} | {images} | {base:.2f} s | {share:+.1%} |", flush=True)
    if args.peak:
        start = time.perf_counter()
        command = [sys.executable, "-m", "sampler", "a circle", "--model", args.model, "--out", "outputs/benchmark",
                   "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"main job: {time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
