"""Which groups of pictures are painted: all settings on the prompts to choose on, then those chosen on other prompts.

A setting says in JSON what a call of the pipeline has beside the checkpoint's defaults: `{"guidance": 2}`,
`{"method": "cads", "strength": 0.5}`, or `{"repulsion": {"strength": 1}}`, the fields of a `Repulsion`; with
`"place": "image"` beside it the push acts elsewhere (see `places`).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from repulsion import Repulsion
from repulsion.objectives import NAMES
from sampler import Pipeline
from sampler.methods import METHODS

from ..prompts import CHOICE, OPEN, full_prompts
from .places import PLACES

REGIMES = {"tiny-sd3": "guided, 20 steps", "tiny-flux": "guidance-distilled, 20 steps", "tiny-turbo": "4 steps"}
BUDGET = 6  # settings that each method may try on each checkpoint
GROUP = 4  # pictures, as in the paper
FULL = full_prompts(30)
BATCHES = {2: 8, 4: 4, 8: 2, 16: 1, 32: 1}  # pictures → seeds, so that small batches are measured on as many pictures
KNOBS = "strength", "η"
ETAS = "1e4", "1e5", "3e5", "1e6", "1e7"
SHARES = 0.5, 1.0, 1.5, 2.0  # of the shipped strength
LOWER = 0.7  # of the guidance above 1, what the second half of the settings has where there is guidance


@dataclass(frozen=True)
class Size:
    """How much of the plan is painted."""

    settings: int  # of each method
    choice: list[str]  # prompts that they are chosen on, one group each (the base: half as many as seeds)
    reported: list[str]  # prompts for the base, repulsion as shipped, and what was chosen
    seeds: int  # groups for each of them
    ablations: tuple[str, ...] | None  # None: all
    ablated: list[str]  # prompts for each row of an ablation
    ablated_seeds: int
    rest: bool = False  # full prompts, and larger batches


SIZES = {
    "full": Size(BUDGET, CHOICE, OPEN, 10, None, OPEN[::2], 2, rest=True),
    "small": Size(3, CHOICE[::4], OPEN[::2], 2, ("blocks", "place", "objective", *KNOBS), OPEN[::4], 1),
    "quick": Size(2, CHOICE[::10], OPEN[::10], 1, KNOBS, OPEN[::10], 1),
}


@dataclass(frozen=True)
class Job:
    """One group to be painted and measured. `setting` is JSON text; `method` is the experiment that asks for it."""

    model: str
    method: str
    setting: str
    prompt: str
    seed: int
    images: int = GROUP

    @property
    def key(self) -> str:
        """What tells this group from every other: two experiments that ask for the same one share it."""
        return json.dumps([self.model, self.setting, self.prompt, self.seed, self.images])

    @property
    def row(self) -> dict:
        return {**asdict(self), "setting": json.loads(self.setting)}

    @classmethod
    def of(cls, row: dict) -> "Job":
        """The job that a row of results is of."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__} | {"setting": json.dumps(row["setting"])})


@cache
def pipeline_of(model: str, device: str = "cpu") -> Pipeline:
    """In float32 on every device, so that it does not matter which one painted a group."""
    return Pipeline.load(model, dtype=torch.float32, device=device)


def call_of(setting: dict) -> dict:
    """The keyword arguments of a pipeline call for a setting. Raises TypeError or ValueError for a wrong one."""
    call = {name: value for name, value in setting.items() if name in ("guidance", "steps")}
    if "repulsion" in setting:
        call["repulsion"] = Repulsion(**setting["repulsion"])
    if "method" in setting:
        rest = {name: value for name, value in setting.items() if name not in ("method", *call)}
        call["method"] = METHODS[setting["method"]](**rest)
    return call


def but(model: str, **change) -> dict:
    """Repulsion as the checkpoint ships it but for this; a scale takes the place of a strength, and the other way."""
    neither = {"strength": None, "scale": None} if {"strength", "scale"} & change.keys() else {}
    return of_fields(replace(pipeline_of(model).defaults.repulsion, **neither | change))


def of_fields(repulsion: Repulsion) -> dict:
    """The setting with all fields that are not those of every `Repulsion`."""
    usual = vars(Repulsion(strength=1.0)) | {"strength": None}
    return {"repulsion": {name: value for name, value in vars(repulsion).items() if value != usual[name]}}


def early(model: str) -> int:
    """τ: repel in the first fifth of the steps, at least in one."""
    return max(1, pipeline_of(model).defaults.steps // 5)


def guided(model: str) -> bool:
    """Whether the checkpoint's own guidance can be lowered."""
    return (pipeline_of(model).defaults.guidance or 1) > 1


def guidance(model: str, share: float) -> float:
    """What is left of the checkpoint's guidance: 1, the prompt alone, at share 0, and all of it at 1."""
    return round(1 + share * (pipeline_of(model).defaults.guidance - 1), 3)


def by_strength(model: str) -> list[dict]:
    """Contextual repulsion as shipped at rising strengths, which every other method is compared with."""
    return [but(model, strength=round(share * pipeline_of(model).defaults.repulsion.strength, 4)) for share in SHARES]


def push(model: str, **length: float) -> dict:
    """In all blocks and both branches one gradient step in each early denoising step, as long as a strength or a scale
    says."""
    return of_fields(Repulsion(steps=early(model), **length))


RIVALS = {  # name → method, its fields, and BUDGET rows of their values, of which smaller sizes take the first
    "coupled noise": ("coupled", "strength", [1.0, 0.5, 0.75, 0.25, 0.4, 0.9]),
    "pink noise": ("pink", "strength", [0.2, 0.1, 0.4, 0.05, 0.15, 0.3]),
    "seed variance": ("seedvariance", "strength", [2.0, 1.0, 3.0, 0.5, 1.5, 4.0]),
    "DAVE": ("dave", "strength", [1.0, 0.5, 1.5, 0.25, 0.75, 2.0]),
    "STRIDE": ("stride", "strength", [0.35, 0.2, 0.7, 0.1, 0.5, 1.0]),
    "Feature Self-Guidance": ("fsg", "strength block", [(0.25, 1), (0.1, 1), (0.5, 1), (0.1, 2), (0.25, 2), (0.5, 2)]),
    "CADS": ("cads", "strength start stop", [(0.5, 0.8, 1.0), (0.5, 0.9, 1.0), (0.5, 0.6, 1.0), (0.1, 0.9, 1.0),
                                             (0.1, 0.6, 1.0), (0.25, 0.5, 0.9)]),
    "SPARKE": ("sparke", "strength every", [(0.05, 1), (0.02, 1), (0.1, 1), (0.1, 2), (0.2, 2), (0.4, 4)]),
    "particle guidance": ("particle", "strength low", [(0.1, 0.0), (0.05, 0.0), (0.3, 0.0), (0.02, 0.0), (0.3, 0.5),
                                                       (1.0, 0.5)]),
    "DiverseFlow": ("diverseflow", "strength", [0.2, 0.1, 0.5, 0.05, 0.02, 1.0]),
    "CNO": ("cno", "strength", [0.3, 0.1, 0.5, 0.05, 0.2, 0.4]),
    "group selection": ("sgi", "strength pruning", [(3.0, 0.5), (3.0, 0.25), (3.0, 0.9), (1.0, 0.25), (1.0, 0.5),
                                                    (1.0, 0.9)]),
}  # fmt: skip


def rival(method: str, fields: str, rows: Iterable) -> list[dict]:
    """Settings of a rival; a row is the value of the only field, or one for each."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [{"method": method, **dict(zip(fields.split(), row, strict=True))} for row in rows]


def settings(model: str) -> dict[str, list[dict]]:
    """Method → BUDGET settings, the most important methods first.

    Where there is guidance, three settings with the checkpoint's and the same with a lower one; else six.
    """
    def tried(six: list[dict]) -> list[dict]:
        return [*six[:3], *[{**one, "guidance": guidance(model, LOWER)} for one in six[:3]]] if guided(model) else six

    own = pipeline_of(model).defaults.repulsion.strength
    lengths = [round(own * factor, 4) for factor in (1.0, 0.5, 1.5, 0.25, 0.75, 2.0)]
    found = {
        "contextual repulsion": tried([but(model, strength=s) for s in lengths]),
        "away from the mean": tried([but(model, strength=s, objective="spread") for s in lengths]),
    }
    if guided(model):
        found["lower guidance"] = [{"guidance": guidance(model, share)} for share in (0.7, 0.85, 0.55, 0.4, 0.2, 0.0)]
        found["interval guidance"] = rival("interval", "strength", [0.05, 0.02, 0.11, 0.08, 0.15, 0.25])
    else:
        most = pipeline_of("tiny-sd3").defaults.guidance
        found["first step from the teacher"] = rival("teacher", "strength weight", [
            (steps, weight) for weight in (most, (1 + most) / 2, 1.0) for steps in (4.0, 1.0)])
    images = [{**push(model, strength=s), "place": "image"} for s in (0.5, 0.25, 1.0, 0.1, 0.75, 0.15)]
    return found | {"image-token repulsion": tried(images)} | {
        name: tried(rival(*rows)) for name, rows in RIVALS.items()}


def ablations(model: str) -> dict[str, dict[str, dict]]:
    """Experiment → row → setting: contextual repulsion as shipped but for one thing, and in `KNOBS` the length of
    the same push on all checkpoints."""
    steps, fifth = pipeline_of(model).defaults.steps, early(model)
    found = {
        "blocks": {name: but(model, blocks=name) for name in ("first", "middle", "last", "all")},
        "place": {"attention": but(model), **{place: {**but(model), "place": place} for place in PLACES}},
        "objective": {name: but(model, objective=name) for name in NAMES},
        "steps": {f"{i + 1} to {i + fifth}": but(model, start=i, steps=fifth) for i in range(0, steps, fifth)}
        | {"all": but(model, start=0, steps=steps)},
        "M": {f"{m}": but(model, iterations=m) for m in (1, 5, 50)},
        "strength": {f"{s}": push(model, strength=s) for s in (0.5, 1.0, 2.0)},
        "η": {eta: push(model, scale=float(eta)) for eta in ETAS},
    }
    if model == "tiny-sd3":
        found["branches"] = {name: but(model, branches=name) for name in ("all", "conditional")}
    if model == "tiny-flux":
        found["single-stream tokens"] = {name: but(model, single_stream_tokens=name)
                                         for name in ("all", "context", "none")}
    return found


def stages(models: list[str], size: Size,
           finalists: Callable[[str, str], list[dict]]) -> Iterator[tuple[str, list[Job]]]:
    """Label and groups of one stage after the other, the most important first.

    finalists: (model, method) → the settings that were chosen, of which the first is painted before the ablations, on
    half of its seeds. It is asked when the method's settings were painted, so when the stage before was.
    """
    def jobs(model: str, method: str, setting: dict, prompts: list[str], seeds: int = 1,
             images: int = GROUP) -> list[Job]:
        return [Job(model, method, json.dumps(setting), prompt, seed, images)
                for seed in range(seeds) for prompt in prompts]

    half = -(-size.seeds // 2)
    effect = [job for model in models for setting in ({}, but(model)) for job in
              jobs(model, "contextual repulsion" if setting else "base", setting, size.reported, size.seeds)]
    yield "base and as shipped", effect + [job for model in models
                                           for job in jobs(model, "base", {}, size.choice, half)]
    tried = {model: settings(model) for model in models}
    yield "contextual repulsion by strength", [job for model in models for setting in by_strength(model)
                                               for job in jobs(model, "strengths", setting, size.reported, half)]
    for method in dict.fromkeys(method for model in models for method in tried[model]):
        having = [model for model in models if method in tried[model]]
        yield f"{method}: choice", [job for model in having for setting in tried[model][method][: size.settings]
                                    for job in jobs(model, method, setting, size.choice)]
        yield f"{method}: verdict", [job for model in having for setting in finalists(model, method)[:1]
                                     for job in jobs(model, method, setting, size.reported, half)]
    yield "ablations", [job for model in models for name, rows in ablations(model).items()
                        if size.ablations is None or name in size.ablations for setting in rows.values()
                        for job in jobs(model, name, setting, size.ablated, size.ablated_seeds)]
    if size.rest:
        yield "full prompts", [job for model in models for setting in told_everything(model)
                               for job in jobs(model, "full prompts", setting, FULL)]
        # what does not repel is the same in any batch
        yield "batches", [job for model in models for job in [
            *jobs(model, "batch", {}, size.ablated, images=max(BATCHES)),
            *[job for images, seeds in BATCHES.items()
              for job in jobs(model, "batch", but(model), size.ablated, seeds, images)]]]
    rest = [(model, "strengths", setting) for model in models for setting in by_strength(model)]
    rest += [(model, method, setting) for model in models for method in tried[model]
             for setting in finalists(model, method)]
    yield "the rest of the verdict", [job for one in rest for job in jobs(*one, size.reported, size.seeds)]


def told_everything(model: str) -> list[dict]:
    """What full prompts are painted with: as shipped, and without guidance, the simplest rival."""
    return [{}, but(model), *([{"guidance": 1.0}] if guided(model) else [])]
