"""Paints and measures groups in several processes, one line of results a group; a run that was stopped goes on."""

import hashlib
import json
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.multiprocessing import get_context
from tqdm import tqdm

from weights import BUNDLED

from .embedding import Embedding
from .measures import measure
from .places import pushing
from .plan import GROUP, Job, call_of, pipeline_of

COST_RUNS = 7  # of each setting, each beside a run of the base
COST_PROMPT = "a circle"


def finished(file: Path) -> list[dict]:
    """The rows of a file of results, or none. A last line that was cut short is dropped, from the file as well."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


@cache
def checksum(model: str) -> str:
    """Of all that a bundled checkpoint's pictures depend on but its repulsion, which every setting says itself."""
    files = sorted(BUNDLED[model].rglob("*.safetensors"))
    defaults = {**json.loads((BUNDLED[model] / "sampling.json").read_text(encoding="utf-8")), "repulsion": None}
    found = hashlib.sha256(json.dumps(defaults, sort_keys=True).encode())
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def stale(rows: Iterable[dict]) -> list[str]:
    """The checkpoints that have changed since some of the rows were painted."""
    return sorted({row["model"] for row in rows if row["checkpoint"] != checksum(row["model"])})


class Painter:
    """Appends to a file the rows of those jobs that it does not hold yet, each as soon as it is there.

    rows: all that the file holds
    """

    def __init__(self, file: Path, pool, device: str, until: float):
        self.file, self.pool, self.until = file, pool, until
        self.paint, self.rows = partial(paint, device=device), finished(file)
        self.done = {Job.of(row).key for row in self.rows}

    def __call__(self, jobs: list[Job], label: str) -> bool:
        """Whether all are there: False where time.monotonic() has passed `until`."""
        todo = [job for job in {job.key: job for job in jobs}.values() if job.key not in self.done]
        with self.file.open("a", encoding="utf-8") as out, tqdm(desc=label, total=len(todo), disable=not todo) as bar:
            for row in self.pool.imap_unordered(self.paint, todo):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
                self.rows.append(row)
                self.done.add(Job.of(row).key)
                bar.update()
                if time.monotonic() > self.until:
                    break
        return all(job.key in self.done for job in jobs)


@contextmanager
def painter(file: Path, workers: int, device: str = "cpu", minutes: float | None = None) -> Iterator[Painter]:
    """A `Painter` with so many processes, which end with the `with` block."""
    file.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    with get_context("spawn").Pool(workers, start_worker) as pool:
        yield Painter(file, pool, device, until)


def start_worker() -> None:
    """One thread, float32 without TF32, and Ctrl-C is the parent's business."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def embedding() -> Embedding:
    return Embedding.load()


def pictures(model: str, setting: dict, prompt: str, seed: int, images: int = GROUP,
             device: str = "cpu") -> list[Image.Image]:
    """The group that a setting paints."""
    pipeline = pipeline_of(model, device)
    with pushing(pipeline.transformer, setting.get("place")):
        return pipeline(prompt, images, seed=seed, **call_of(setting))


def paint(job: Job, device: str = "cpu") -> dict:
    """The row of one group: the job, the checkpoint, and what is measured of its pictures."""
    found = pictures(job.model, json.loads(job.setting), job.prompt, job.seed, job.images, device)
    return {**job.row, "checkpoint": checksum(job.model), **measure(found, job.prompt, embedding())}


def costs(model: str, settings: list[dict], runs: int, images: int = GROUP) -> list[dict]:
    """What each setting adds to the time of a group on the CPU: the median ratio to a base run right before it.

    One process, all its threads, nothing beside it.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in settings]
    for seed in range(-1, runs):  # the first time round warms up
        for setting, found in zip(settings, times, strict=True):
            pair = []
            for one in ({}, setting):
                start = time.perf_counter()
                pictures(model, one, COST_PROMPT, max(seed, 0), images)
                pair.append(time.perf_counter() - start)
            if seed >= 0:
                found.append(tuple(pair))
    return [{"model": model, "setting": setting, "base_ms": round(1000 * median(a for a, _ in pairs), 1),
             "ratio": round(median(b / a for a, b in pairs), 4)}
            for setting, pairs in zip(settings, times, strict=True)]
