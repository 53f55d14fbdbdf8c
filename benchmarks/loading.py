"""What loading costs beside reading the bytes with safetensors alone: `python -m benchmarks.loading`.

The files have SD3-medium's true headers and size but take no room on the disk: their numbers were never written, so
they read as zeros. Each load has a process of its own; loads of ours and of the library's alternate, so that a noisy
machine disturbs both alike, and medians are compared. Needs 10 GB of memory and takes some minutes.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from weights import load_transformer

MANIFESTS = Path(__file__).parents[1] / "tests" / "data" / "manifests.json.gz"
PREFIX = "model.diffusion_model."
MOST_TIME, MOST_MEMORY, CONSTANT = 1.2, 1.05, 600e6  # × the library's time; × the parameters' bytes + a constant


def sparse_file(path: Path, shapes: dict[str, list[int]], dtype: Callable[[str], str]) -> Path:
    """A header, and after it as many bytes as it promises, none of which is written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * (1 if dtype(name) == "F8_E4M3" else 2)
        header[name] = {"dtype": dtype(name), "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + end)
    return path


def make_files(folder: Path) -> dict[str, tuple[Path, dict]]:
    """Row of the table: the checkpoint and how it is loaded."""
    manifests = json.loads(gzip.decompress(MANIFESTS.read_bytes()))
    original, hub = manifests["sai/sd3_medium"]["tensors"], manifests["diffusers/sd3-medium.transformer"]
    config = json.dumps(hub["config"] | {"_class_name": "SD3Transformer2DModel"})
    single, sharded, stem = folder / "single", folder / "sharded", "diffusion_pytorch_model"
    whole = sparse_file(folder / "sd3_medium.safetensors", original, lambda name: "F16")
    narrow = sparse_file(folder / "sd3_medium_fp8.safetensors", original,
                         lambda name: "F8_E4M3" if len(original[name]) == 2 else "F16")
    sparse_file(single / f"{stem}.safetensors", hub["tensors"], lambda name: "F16")
    names, weight_map = sorted(hub["tensors"]), {}
    for i in range(2):
        part = names[i * len(names) // 2 : (i + 1) * len(names) // 2]
        file = sparse_file(sharded / f"{stem}-0000{i + 1}-of-00002.safetensors",
                           {name: hub["tensors"][name] for name in part}, lambda name: "F16")
        weight_map |= dict.fromkeys(part, file.name)
    (sharded / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (single, sharded):
        (path / "config.json").write_text(config)
    return {
        "original, float16": (whole, {}), "hub, float16": (single, {}), "hub, float16, two shards": (sharded, {}),
        "original, float16 to bfloat16": (whole, {"dtype": "bfloat16"}),
        "original, float8 kept": (narrow, {"dtype": "bfloat16", "keep_float8": True}),
    }


def measure(reader: str, path: Path, dtype: str | None = None, keep_float8: bool = False) -> dict[str, float]:
    """Load once, here: seconds, processor seconds, peak resident bytes, bytes of what was loaded."""
    wide = getattr(torch, dtype) if dtype else None
    start, used = time.perf_counter(), time.process_time()
    if reader == "ours":
        loaded = load_transformer(path, dtype=wide, keep_float8=keep_float8)
    else:
        loaded = []
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if path.is_dir() or name.startswith(PREFIX):
                        tensor = opened.get_tensor(name)
                        same = wide is None or keep_float8 and tensor.element_size() == 1
                        loaded.append(tensor.clone() if same or tensor.dtype == wide else tensor.to(wide))
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    tensors = loaded.state_dict().values() if reader == "ours" else loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "processor": processor, "peak": peak, "bytes": sum(t.nbytes for t in tensors)}


def measure_apart(*arguments: object) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--one", json.dumps(arguments, default=str)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table_row(name: str, runs: dict[str, list[dict[str, float]]]) -> tuple[str, bool]:
    """One line of the table, and whether the bounds are kept."""
    ours, library = ({key: statistics.median(run[key] for run in runs[who]) for key in runs[who][0]} for who in runs)
    ratio, worst = ours["seconds"] / library["seconds"], max(run["peak"] for run in runs["ours"])
    kept = ratio <= MOST_TIME and worst <= MOST_MEMORY * ours["bytes"] + CONSTANT
    cells = [
        name, f"{ours['bytes'] / 1e9:.2f}", f"{ours['seconds']:.2f}", f"{library['seconds']:.2f}", f"{ratio:.2f}",
        f"{ours['processor'] / library['processor']:.2f}", f"{worst / 1e9:.2f}", f"{library['peak'] / 1e9:.2f}",
        f"{(worst - MOST_MEMORY * ours['bytes']) / 1e6:.0f}", "yes" if kept else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |", kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="loads of each kind, after one that fills the cache")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        reader, path, options = json.loads(args.one)
        print(json.dumps(measure(reader, Path(path), **options)))
        return 0
    heads = ["SD3-medium's transformer", "GB", "s", "safetensors, s", "ratio", "processor, ratio", "peak, GB",
             "safetensors, GB", "above 1.05 × size, MB", "within bounds"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    within = True
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, options) in make_files(Path(folder)).items():
            runs = {"ours": [], "library": []}
            for run in range(args.runs + 1):
                for who in runs:
                    found = measure_apart(who, path, options)
                    if run:
                        runs[who].append(found)
            line, kept = table_row(name, runs)
            print(line, flush=True)
            within = within and kept
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
