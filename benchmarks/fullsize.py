"""Public checkpoints at their real sizes, without their weights: `python -m benchmarks.fullsize [--device cuda]`.

On the CPU: each transformer from a sparse file in bfloat16 (`benchmarks.loading`), in a process of its own: time to
open, one step at 256 × 256 pixels, and the most anonymous memory meanwhile (RssAnon, imports included).

On a GPU: random bfloat16 weights and a random text context, pictures as large as the checkpoint's (1024 × 1024). One
denoising step with the guidance of the checkpoint, without repulsion and with it in all blocks: M gradient steps as
published (FLUX.1-dev's for FLUX, SD3.5-large's for SD3; of the same strength, since η has no meaning for random
weights), and M = 1 as klein ships with. Pushes take the difference of the steps, which alternate; a group of one is not
pushed. Peaks are those of PyTorch's allocator, weights included, of the transformer and of the decoder apart.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mmdit import Autoencoder, AutoencoderConfig, MMDiT, MMDiTConfig
from repulsion import Repulsion
from weights import PUBLIC, Settings

from .loading import measure_apart, sparse_transformer
from .memory import GIB, IMAGES, autoencoder_of, build, context_tokens, guided, latent_shape, text_encoders
from .scale import MODELS, step_operations
from .solver import finished, milliseconds

CPU = ("sd3-medium", "sd3.5-medium", "flux2-klein-4b", "sd3.5-large", "flux2-klein-9b", "flux1-schnell", "flux1-dev",
       "flux2-dev")  # one of each set of sizes
ON_CPU = "checkpoint | parameters, 10⁹ | file, GB | opens, s | step at 256², s | own memory, GB"
ON_GPU = ("checkpoint | images | weights, GiB | step, ms | TFLOP/s | pushes, paper's M, ms | % | M = 1, ms | % | "
          "peak, GiB | decode a picture, ms | its peak, GiB")


def from_file(name: str) -> list[str]:
    """A row: a transformer from a sparse file, on the CPU."""
    config = PUBLIC[name].config
    size = size_of(build(MMDiT, config))
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        return [name, f"{size / 2e9:.2f}", f"{size / 1e9:.1f}", "more than this machine's memory"]
    with tempfile.TemporaryDirectory() as folder:
        path = sparse_transformer(Path(folder) / f"{name}.safetensors", config)
        found = measure_apart("ours", str(path), None, True)
    return [name, f"{found['parameters'] / 1e9:.2f}", f"{size / 1e9:.1f}", f"{found['seconds']:.2f}",
            f"{found['step']:.1f}", f"{found['all bytes'] / 1e9:.2f}"]


def size_of(model: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def random_weights(network: type[nn.Module], config: MMDiTConfig | AutoencoderConfig, device: str) -> nn.Module:
    """A network in bfloat16 on the device; scales of norms and the latents' variances are about 1."""
    model = build(network, config).to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.normal_(float("norm" in name or "variance" in name), 0.02)
    return model


def timed(device: str, runs: int, calls: list[Callable]) -> tuple[list[float], float]:
    """Median milliseconds of each call, after the last of them to warm up; the most GiB allocated meanwhile."""
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    calls[-1]()
    times = milliseconds(runs, *calls, warm_up=False, clock=partial(finished, device) if cuda else time.perf_counter)
    return times, torch.cuda.max_memory_allocated(device) / GIB if cuda else float("nan")


def decoding(config: AutoencoderConfig, shape: tuple[int, int, int], device: str, runs: int) -> list[str]:
    """Cells: one picture, as the pipeline decodes them."""
    model, latent = random_weights(Autoencoder, config, device), torch.randn(1, *shape, device=device)
    (decode,), peak = timed(device, runs, [lambda: model.decode(latent.bfloat16()).float()])
    return [f"{decode:.1f}", f"{peak:.2f}"]


def stepping(model: MMDiT, settings: Settings, images: int, device: str, runs: int) -> list[str]:
    """Cells: one denoising step of so many pictures."""
    config, shape = model.config, latent_shape(model.config, settings)
    tokens = context_tokens(config, text_encoders(config, settings.prompt_tokens))
    paper = PUBLIC["flux1-dev" if config.position == "rope" else "sd3.5-large"].settings.repulsion
    kinds = [None, Repulsion(strength=1.0), replace(paper, scale=None, strength=1.0)][: 1 if images == 1 else 3]
    velocities = [guided(model, settings, tokens, repulsion) for repulsion in kinds]
    latent = torch.randn(images, *shape, device=device)
    (base, *pushed), peak = timed(device, runs, [lambda v=v: v(latent, 1.0, 0) for v in velocities])
    cells = [f"{cost:.1f}" for time in reversed(pushed) for cost in (time - base, 100 * (time / base - 1))]
    branches = 1 if velocities[0].weight is None else 2
    operations = images * branches * step_operations(config, tokens, shape[1] // config.patch_size)
    return [f"{base:.1f}", f"{operations / base / 1e9:.0f}", *(cells or ["–"] * 4), f"{peak:.2f}"]


@torch.no_grad()
def on_device(name: str, device: str, runs: int, images: list[int]) -> None:
    """Prints a row for each number of pictures."""
    config, settings = PUBLIC[name].config, PUBLIC[name].settings
    decode = decoding(autoencoder_of(config), latent_shape(config, settings), device, runs)
    model = random_weights(MMDiT, config, device)
    weights = f"{size_of(model) / GIB:.2f}"
    for number in images:
        write([name, f"{number}", weights, *stepping(model, settings, number, device, runs), *decode])


def write(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=PUBLIC, metavar="NAME")
    parser.add_argument("--images", nargs="+", type=int, default=IMAGES)
    parser.add_argument("--runs", type=int, default=2, help="on a GPU, of each kind, after one to warm up")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    columns = (ON_CPU if cpu else ON_GPU).split(" | ")
    write(columns)
    write(["---"] * len(columns))
    for name in args.models or (CPU if cpu else MODELS):
        try:
            if cpu:
                write(from_file(name))
            else:
                on_device(name, args.device, args.runs, args.images)
        except Exception as error:  # out of memory, for example: the next may fit
            write([name, f"failed: {type(error).__name__}: {error}".partition("\n")[0]])
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
