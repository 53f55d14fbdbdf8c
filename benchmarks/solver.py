"""The Gram solver against the paper's loop, and what it costs by itself: `python -m benchmarks.solver`.

Medians on one thread. First, whole pushes of 4 samples of 512 × 3072 float32 tokens, M = 50, and the error of the
displacement against the loop in float64. Second, the bookkeeping on B × B matrices alone, in CPU time. Third, the same
error for each objective on float64 tokens. Last, the most memory that one push needs, relative to its input, which is
included.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from repulsion import repel
from repulsion.objectives import NAMES
from repulsion.repel import gram_matrix
from repulsion.solvers import ascend_autograd, mixing_matrix

PUSH = {"scale": None, "strength": 1.0}
BOOKKEEPING = [(4, 50), (4, 100), (8, 50), (16, 50), (64, 50)]  # B, M


def tokens(samples: int, count: int = 512, width: int = 3072, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples with most in common, as in a model: cosines of 0.997 to 0.9995, no two pairs alike."""
    generator = torch.Generator().manual_seed(0)
    shared, apart = (torch.randn(n, count, width, generator=generator) for n in (1, samples))
    return (shared + torch.linspace(0.02, 0.06, samples)[:, None, None] * apart).to(dtype)


def milliseconds(runs: int, *calls: Callable, warm_up: bool = True,
                 clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """The median time of each call; they alternate, so that a noisy machine disturbs all alike. For work of one thread
    `time.process_time` leaves out what the machine does meanwhile."""
    times = [[] for _ in calls]
    for run in range(not warm_up, runs + 1):
        for call, found in zip(calls, times, strict=True):
            start = clock()
            call()
            if run:  # the first warms up
                found.append(1000 * (clock() - start))
    return [statistics.median(found) for found in times]


def finished(device: str | torch.device) -> float:
    """A clock: the time when a GPU has done all that it was told to."""
    torch.cuda.synchronize(device)
    return time.perf_counter()


def error(found: Tensor, reference: Tensor, start: Tensor) -> float:
    """Of the displacement, relative to its length."""
    return ((found.double() - reference).norm() / (reference - start).norm()).item()


class Allocated(TorchDispatchMode):
    """The most bytes that tensors on a device hold at one time while it is active: those of `held`, which stay, and
    what operations return, views included."""

    def __init__(self, *held: Tensor, device: str = "cpu"):
        super().__init__()
        self.device, self.alive = device, {}
        self.kept = {storage for storage, _ in self.storages(held)}
        self.held = self.most = sum(dict(self.storages(held)).values())

    def storages(self, tensors: Iterable) -> list[tuple[StorageWeakRef, int]]:
        here = [x.untyped_storage() for x in tensors if isinstance(x, Tensor) and x.device.type == self.device]
        return [(StorageWeakRef(storage), storage.nbytes()) for storage in here]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for storage, size in self.storages(found if isinstance(found, (list, tuple)) else [found]):
            if storage not in self.kept and storage not in self.alive:
                self.alive = {old: bytes for old, bytes in self.alive.items() if not old.expired()} | {storage: size}
                self.most = max(self.most, self.held + sum(self.alive.values()))
        return found


def pushes(runs: int) -> list[list[str]]:
    """Rows of the first table."""
    c, settings = tokens(4), (PUSH["strength"], PUSH["scale"], 50, "vendi", 1e-4)
    solvers = {"loop, float64": lambda: ascend_autograd(c.flatten(1)[None].double(), *settings),
               "loop, float32": lambda: ascend_autograd(c.flatten(1)[None], *settings),
               "Gram": lambda: repel(c, iterations=50, **PUSH)}
    reference = solvers["loop, float64"]().view_as(c)
    errors = [error(solve().view_as(c), reference, c) for solve in solvers.values()]
    times = milliseconds(runs, *solvers.values())
    return [[name, f"{ms:.0f}", f"{times[1] / ms:.1f} ×", f"{off:.1e}"]
            for name, ms, off in zip(solvers, times, errors, strict=True)]


def bookkeeping(runs: int) -> list[list[str]]:
    """Rows of the second table: as it is for one group."""
    grams = [gram_matrix(tokens(samples, count=16)[None]) for samples, _ in BOOKKEEPING]
    calls = [lambda gram=gram, m=m: mixing_matrix(gram, 1.0, None, m, "vendi", 1e-4)
             for gram, (_, m) in zip(grams, BOOKKEEPING, strict=True)]
    times = milliseconds(10 * runs, *calls, clock=time.process_time)
    return [[f"{samples}", f"{m}", f"{ms:.2f}"] for (samples, m), ms in zip(BOOKKEEPING, times, strict=True)]


def objectives() -> list[list[str]]:
    """Rows of the third table."""
    c = tokens(4, count=64, dtype=torch.float64)
    pairs = {name: [repel(c, iterations=50, objective=name, solver=solver, **PUSH) for solver in ("gram", "autograd")]
             for name in NAMES}
    return [[name, f"{error(*pair, c):.1e}"] for name, pair in pairs.items()]


def memory() -> list[list[str]]:
    """Rows of the last table."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        c = tokens(4, dtype=dtype)
        with Allocated() as made:
            repel(c, iterations=50, **PUSH)
        found.append([str(dtype).removeprefix("torch."), f"{made.most / c.nbytes:.2f} ×"])
    return found


def show(head: str, rows: list[list[str]]) -> None:
    columns = head.split(" | ")
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    print("\n".join(lines) + "\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    show("solver | ms | faster than the float32 loop | error", pushes(args.runs))
    show("B | M | bookkeeping, ms", bookkeeping(args.runs))
    show("objective | error", objectives())
    show("tokens | peak memory of a push", memory())


if __name__ == "__main__":
    main()
