"""The training loop of all networks: data, progress, checkpoints, resuming, exponential moving average."""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm

RECORDED = 125  # steps that replay one CUDA graph
FREE = ("out", "minutes", "compile", "device")  # options that may change when a run is gone on with


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training program, whose work folder --out is made. Ends the program where that folder holds a
    run with other options: what it has cached belongs to these."""
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file, now = args.out / "options.json", {name: str(value) for name, value in vars(args).items() if name not in FREE}
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else now
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            parser.error(f"{args.out} holds a run with {name} {before.get(name)}, not {now.get(name)}: give another "
                         "--out, or the same options")
    file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return args


def optimizers(modules: dict[str, nn.Module], lr: float, muon_lr: float | None,
               capturable: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW, and where `muon_lr` is given Muon for the matrices and convolutions of all but the first and last layers.

    Muon (K. Jordan, 2024) makes each update orthogonal; modulation layers, which start at zero, stay with AdamW.
    """
    matrices, rest = [], []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            inner = any(part in name for part in ("blocks.", "layers.", "middle.", ".resample."))
            if muon_lr and inner and "modulation" not in name and parameter.ndim in (2, 4):
                matrices.append(parameter if parameter.ndim == 2 else as_matrix(parameter))
            else:
                rest.append(parameter)
    found = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, capturable=capturable)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01))
    return found


def as_matrix(convolution: nn.Parameter) -> nn.Parameter:
    """The weight (c_out, c_in, y, x) as a matrix (c_out, c_in · y · x), which shares its memory and its gradient."""
    matrix = nn.Parameter(convolution.data.flatten(1))
    convolution.register_post_accumulate_grad_hook(lambda weight: setattr(matrix, "grad", weight.grad.flatten(1)))
    return matrix


def loaded(batch_at: Callable[[int], list[Tensor] | Tensor], start: int, steps: int, device: str) -> DataLoader:
    """The batches of the steps from `start` on; for a GPU other processes make them meanwhile."""
    workers = max(1, os.cpu_count() - 2) if device.startswith("cuda") else 0
    return DataLoader(range(start, steps), batch_size=None, collate_fn=batch_at, num_workers=workers)


def autocast(device: str) -> torch.autocast:
    """Products in bfloat16, where the device has instructions for them: without, a CPU takes several times as long."""
    return torch.autocast(device, torch.bfloat16, enabled=not device.startswith("cpu") or cpu_has_bfloat16())


@cache
def cpu_has_bfloat16() -> bool:
    known = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 has none
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class Recorded:
    """A training step as a CUDA graph: thousands of small kernels which Python need not start one by one.

    What `update` computes on the CPU, such as learning rates, is fixed at the recording.
    """

    def __init__(self, update: Callable[..., Tensor], batch: Sequence[Tensor]):
        self.batch, self.graph = [part.cuda() for part in batch], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self.loss = update(*self.batch)

    def __call__(self, *batch: Tensor) -> Tensor:
        for ours, given in zip(self.batch, batch, strict=True):
            ours.copy_(given)
        self.graph.replay()
        return self.loss


def train(name: str, modules: dict[str, nn.Module], batch_at: Callable[[int], list[Tensor]],
          loss_of: Callable[..., Tensor], steps: int, folder: Path, *, lr: float, muon_lr: float | None = None,
          ema: float = 0.0, device: str = "cpu", save_every: int = 2 * RECORDED, minutes: float = math.inf) -> None:
    """Minimize `loss_of(*batch_at(step))` and leave the (averaged) weights in `modules` and in `folder/name.pt`.

    `batch_at` makes the data of a step on the CPU from its number alone, so an interrupted run resumes with identical
    results; `loss_of` is given it on the device. The learning rate warms up over 2 % of the steps and falls linearly to
    zero over the second half. `ema` is the decay of the exponential moving average of the weights; 0 keeps the last.
    `minutes`: the run, counted from this start of it, ends then if not before, with the learning rate falling by the
    clock.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:  # CUDA graphs are recorded on another stream than the default one
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    file, opts = folder / f"{name}.pt", optimizers(modules, lr, muon_lr, capturable=on_gpu)
    base_rates = [o.param_groups[0]["lr"] for o in opts]
    together = nn.ModuleDict(modules)
    weights = together.state_dict()
    average = {k: v.detach().clone() for k, v in weights.items()}
    start = 0
    if file.exists():
        saved = torch.load(file, map_location=device, weights_only=True)
        start, average = saved["step"], saved["average"]
        together.load_state_dict(saved["model"])
        for optimizer, state in zip(opts, saved["optimizers"], strict=False):
            optimizer.load_state_dict(state)

    progress = tqdm(loaded(batch_at, start, steps, device), initial=start, total=steps, desc=name, mininterval=5)
    running, recorded, decay, began = None, None, 0.0, time.monotonic()

    def update(*batch: Tensor) -> Tensor:
        # On CPUs the fused attention's backward pass is slower than plain matrix products for so few tokens.
        with nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH), autocast(device):
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(together.parameters(), 1.0)
        for optimizer in opts:
            optimizer.step()
        together.zero_grad(set_to_none=True)
        torch._foreach_lerp_([*average.values()], [*weights.values()], 1 - decay)
        return loss.detach()

    for step, batch in enumerate(progress, start):
        torch.manual_seed(step)
        done = max(step / steps, (time.monotonic() - began) / (60 * minutes))
        last = step + 1 == steps or done >= 1
        for optimizer, base in zip(opts, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * min(1.0, (step + 1) / (0.02 * steps), 2 * max(1 - done, 0))
        decay = min(ema, (step + 1) / (step + 10))
        if on_gpu and step >= start + 3:  # after a few steps nothing is initialized, compiled or chosen any more
            if recorded is None or step % RECORDED == 0:
                recorded = Recorded(update, batch)
            loss = recorded(*batch)
        else:
            loss = update(*[part.to(device) for part in batch])
        running = loss.clone() if running is None else running.lerp(loss, 0.02)
        if step % 20 == 0:  # reading the loss waits for a GPU
            progress.set_postfix(loss=f"{running.item():.4f}", refresh=False)
        if (step + 1) % save_every == 0 or last:
            save_atomically({"step": steps if last else step + 1, "model": weights, "average": average,
                             "optimizers": [] if last else [o.state_dict() for o in opts]}, file)
        if last:
            break
    together.load_state_dict(average)


def save_atomically(state: dict, file: Path) -> None:
    """Write a file atomically, so that an interrupted run leaves no partial file."""
    torch.save(state, f"{file}.part")
    os.replace(f"{file}.part", file)


def batches(count: int, size: int, seed: int) -> Callable[[int], Tensor]:
    """A function from step to its batch of indices: every example once per epoch, in an order from seed and epoch.

    Raises ValueError for fewer examples than a batch has.
    """
    if count < size:
        raise ValueError(f"{count} examples are fewer than a batch of {size}: take more, or smaller batches")
    per_epoch = count // size

    def at(step: int) -> Tensor:
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
        return order[index * size : (index + 1) * size]

    return at
