"""What repulsion costs in whole runs of tiny-sd3.

`python -m benchmarks.overhead`. Runs with and without alternate, so that a noisy machine disturbs both alike; the
share is the median of the paired ratios. `--peak` adds the peak memory of the main job, in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
import time
from dataclasses import replace

from repulsion import Repulsion

from .paper.plan import of_fields, pipeline_of
from .paper.run import costs


def settings(own: Repulsion) -> dict[str, Repulsion]:
    """What is measured: the settings that ship, and the paper's numbers of steps in all blocks and both branches."""
    paper = Repulsion(strength=1.0, iterations=50, steps=1)
    return {"as shipped": own, "M = 50 in one step": paper,
            "M = 100 in four steps": replace(paper, iterations=100, steps=4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--peak", action="store_true", help="run the main job too: its time and peak memory")
    args = parser.parse_args()
    measured = settings(pipeline_of(args.model).defaults.repulsion)
    print("| repulsion | images | without | with it |\n|---|---|---|---|")
    for images in (4, 8):
        rows = costs(args.model, [of_fields(repulsion) for repulsion in measured.values()], args.runs, images)
        for name, row in zip(measured, rows, strict=True):
            print(f"| {name} | {images} | {row['base_ms'] / 1000:.2f} s | {row['ratio'] - 1:+.1%} |", flush=True)
    if args.peak:
        start = time.perf_counter()
        command = [sys.executable, "-m", "sampler", "a circle", "--model", args.model, "--out", "outputs/benchmark",
                   "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"main job: {time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
