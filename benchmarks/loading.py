"""What loading costs beside the safetensors library alone: `python -m benchmarks.loading`.

The files have true headers and full size but take no room on the disk: their numbers were never written, so they read
as zeros. Each load has a process of its own; ours and the library's alternate, so that a noisy machine disturbs both
alike, and medians are compared. Memory is what the process holds of its own (RssAnon), beyond that of the imports:
pages of a mapped file are the system's cache. `--step` also runs Qwen3-4B on 512 tokens, which reads every number, 6
GB; steps of the transformers: `benchmarks.fullsize`.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors.torch import load_file

from mmdit import MMDiT, MMDiTConfig, TextDecoder
from mmdit.meta import on_meta
from weights import load_text_encoder, load_transformer
from weights.configs import sizes_of
from weights.save import transformer_kind

MANIFESTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "tests/data/manifests.json.gz").read_bytes()))
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I64": 8}
ROWS = {  # name: manifest, dtype in the file, where it is stored, options of loading
    "SD3-medium, original": ("sai/sd3_medium", "F16", "sd3_medium.safetensors", {}),
    "SD3-medium, hub": ("diffusers/sd3-medium.transformer", "F16", "hub/diffusion_pytorch_model.safetensors", {}),
    "SD3-medium, original, to bfloat16": ("sai/sd3_medium", "F16", "sd3_medium.safetensors", {"dtype": "bfloat16"}),
    "SD3-medium, float8 kept": ("sai/sd3_medium", lambda name, shape: "F8_E4M3" if len(shape) == 2 else "F16",
                                "sd3_medium_fp8.safetensors", {}),
    "FLUX.1-dev, original": ("bfl/flux1-dev", "BF16", "flux1-dev.safetensors", {}),
    "FLUX.2-klein-4B, original": ("bfl/flux2-klein-4b", "BF16", "flux-2-klein-4b.safetensors", {}),
    "Qwen3-4B, without what klein does not read": ("text/qwen3-4b", "BF16", "qwen_3_4b.safetensors", {}),
}


def sparse_file(path: Path, shapes: dict[str, Sequence[int]], dtype: str | Callable = "BF16") -> Path:
    """A safetensors file of full size that takes no room: a true header, and after it as many bytes as it promises,
    none of which is written. `dtype` is a name of the library's, or a function of a tensor's name and shape."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        word = dtype if isinstance(dtype, str) else dtype(name, shape)
        start, end = end, end + prod(shape) * BYTES[word]
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # as the library writes it, so that all numbers are aligned
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + end)
    return path


def sparse_transformer(path: Path, config: MMDiTConfig) -> Path:
    """The same of a transformer of these sizes in bfloat16, under the names of its family's original files."""
    layout = transformer_kind(config).layouts[0]
    parts = layout.split(on_meta(MMDiT, config).state_dict(), sizes_of(config))
    return sparse_file(path, {layout.prefix + theirs: tuple(part.shape) for _, theirs, part in parts})


def anonymous() -> int:
    """Bytes of this process that belong to no file (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextmanager
def most_anonymous() -> Iterator[list[int]]:
    """A list whose last number is the most bytes of `anonymous` so far, looked at every few milliseconds."""
    found, done = [anonymous()], Event()

    def watch() -> None:
        while not done.wait(0.003):
            found[-1] = max(found[-1], anonymous())

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def measure(reader: str, path: str, dtype: str | None = None, step: bool = False) -> dict[str, float]:
    """Load once, here: seconds and anonymous bytes; with `step` those of one forward pass too, the most that the
    process held, imports included; and the parameters."""
    wide, before = getattr(torch, dtype) if dtype else None, anonymous()
    start = time.perf_counter()
    if reader == "ours":
        loaded = (load_text_encoder if "qwen" in path else load_transformer)(path, dtype=wide)
    else:
        loaded = load_file(path)
        loaded = {name: tensor.to(wide) for name, tensor in loaded.items()} if wide else loaded
    found = {"seconds": time.perf_counter() - start, "bytes": anonymous() - before}
    if step:
        with torch.no_grad(), most_anonymous() as most:
            forward(loaded)
        found |= {"step": time.perf_counter() - start - found["seconds"], "all bytes": most[-1],
                  "parameters": sum(parameter.numel() for parameter in loaded.parameters())}
    return found


def forward(model: MMDiT | TextDecoder) -> None:
    """One picture of 256 × 256 pixels, or one prompt."""
    if isinstance(model, TextDecoder):
        model(torch.zeros(1, 512, dtype=torch.int64))
        return
    config = model.config
    model(torch.randn(1, config.latent_channels, 16 * config.patch_size, 16 * config.patch_size), torch.ones(1),
          torch.randn(1, 512, config.context_dim), torch.randn(1, config.pooled_dim) if config.pooled_dim else None,
          torch.ones(1) if config.guidance_embedding else None)


def measure_apart(*arguments: object) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--one", json.dumps(arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="loads of each kind, after one that fills the cache")
    parser.add_argument("--step", action="store_true", help="Qwen3-4B reads a prompt too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    print("| transformer | s | safetensors, s | ratio | own memory, MB | safetensors', MB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for row, (manifest, dtype, name, options) in ROWS.items():
            path = str(sparse_file(Path(folder) / name, MANIFESTS[manifest]["tensors"], dtype))
            runs = {who: [] for who in ("ours", "library")}
            for i in range(args.runs + 1):
                for who, found in runs.items():
                    found += [measure_apart(who, path, *options.values())][: i > 0]
            ours, library = ({key: statistics.median(run[key] for run in found) for key in ("seconds", "bytes")}
                             for found in runs.values())
            print(f"| {row} | {ours['seconds']:.3f} | {library['seconds']:.3f} | "
                  f"{ours['seconds'] / library['seconds']:.2f} | {ours['bytes'] / 1e6:.0f} | "
                  f"{library['bytes'] / 1e6:.0f} |", flush=True)
        for row in list(ROWS)[-1:] if args.step else ():
            found = measure_apart("ours", str(Path(folder) / ROWS[row][2]), None, True)
            print(f"\n{row}: {found['parameters'] / 1e9:.2f} billion parameters, opened in {found['seconds']:.2f} s, "
                  f"forward pass {found['step']:.0f} s, the process's own memory {found['all bytes'] / 1e9:.2f} GB.")


if __name__ == "__main__":
    main()
