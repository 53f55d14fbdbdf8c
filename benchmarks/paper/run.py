"""Paints and measures groups in several processes, one line of results a group; a run that was stopped goes on."""

import json
import signal
import time
from functools import cache
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.multiprocessing import get_context
from tqdm import tqdm

from sampler.methods import METHODS

from .embedding import Embedding
from .measures import measure
from .places import pushing
from .plan import GROUP, Job, call_of, guided, pipeline_of

COST_RUNS = 7  # of each method, each beside a run of the base
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


def run(jobs: list[Job], file: Path, workers: int, label: str) -> None:
    """Append to `file` the rows of those jobs that it does not hold yet, each as soon as it is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {Job(**{name: row[name] for name in Job.__dataclass_fields__ if name != "setting"},
                setting=json.dumps(row["setting"])).key for row in finished(file)}
    todo = [job for job in jobs if job.key not in done]
    if not todo:
        return
    with get_context("spawn").Pool(workers, start_worker) as pool, file.open("a") as out:
        rows = pool.imap_unordered(paint, todo)
        for row in tqdm(rows, label, initial=len(jobs) - len(todo), total=len(jobs), smoothing=0.02):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


def start_worker() -> None:
    """One thread, and Ctrl-C is the parent's business."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def embedding() -> Embedding:
    return Embedding.load()


def pictures(model: str, setting: dict, prompt: str, seed: int, images: int = GROUP) -> list[Image.Image]:
    """The group that a setting paints."""
    pipeline = pipeline_of(model)
    with pushing(pipeline.transformer, setting.get("place")):
        return pipeline(prompt, images, seed=seed, **call_of(setting, pipeline))


def paint(job: Job) -> dict:
    """The row of one group: the job, what is measured of its pictures, and how long they took."""
    start = time.perf_counter()
    found = pictures(job.model, json.loads(job.setting), job.prompt, job.seed, job.images)
    took = 1000 * (time.perf_counter() - start)
    return {**job.row, **measure(found, job.prompt, embedding()), "milliseconds": round(took, 1)}


def costs(model: str, runs: int = COST_RUNS) -> list[dict]:
    """What every method adds to the time of a group: method → the median ratio to a base run right before it.

    One process, all its threads, nothing beside it; every method as it comes, repulsion as shipped.
    """
    settings = {"contextual repulsion": {"repulsion": {}}}
    settings |= {name: {"method": name} for name in METHODS if name != ("teacher" if guided(model) else "interval")}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    for seed in range(-1, runs):  # the first time round warms up
        for name, setting in settings.items():
            pair = []
            for one in ({}, setting):
                start = time.perf_counter()
                pictures(model, one, COST_PROMPT, max(seed, 0))
                pair.append(time.perf_counter() - start)
            if seed >= 0:
                times[name].append(tuple(pair))
    return [{"model": model, "method": name, "base_ms": round(1000 * median(a for a, _ in pairs), 1),
             "ratio": round(median(b / a for a, b in pairs), 4)} for name, pairs in times.items()]
