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

from sampler import Pipeline


def paired(pipeline: Pipeline, images: int, runs: int) -> tuple[float, float, float]:
    """Median seconds without and with repulsion, and the median of the paired ratios less 1."""
    times: dict[str, list[float]] = {"base": [], "repelled": []}
    for run in range(runs + 1):
        for name, repulsion in (("base", None), ("repelled", pipeline.defaults.repulsion)):
            start = time.perf_counter()
            pipeline("a circle", images, seed=run, repulsion=repulsion)
            if run:  # the first warms up
                times[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(times["base"], times["repelled"], strict=True)]
    return statistics.median(times["base"]), statistics.median(times["repelled"]), statistics.median(ratios) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sd3")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--peak", action="store_true", help="run the main job too: its time and peak memory")
    args = parser.parse_args()
    pipeline = Pipeline.load(args.model)
    print("| images | base | with repulsion | share |\n|---|---|---|---|")
    for images in (4, 8):
        base, repelled, share = paired(pipeline, images, args.runs)
        print(f"| {images} | {base:.2f} s | {repelled:.2f} s | {share:+.1%} |", flush=True)
    if args.peak:
        start = time.perf_counter()
        command = [sys.executable, "-m", "sampler", "a circle", "--model", args.model, "--out", "outputs/benchmark",
                   "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"main job: {time.perf_counter() - start:.1f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
