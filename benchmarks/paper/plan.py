"""Which groups of pictures are painted: the effect as shipped, every method on every checkpoint, and ablations.

A setting says in JSON what a call of the pipeline has beside the checkpoint's defaults: `{"guidance": 2}`,
`{"method": "cads", "strength": 0.5}`, or `{"repulsion": {"strength": 1}}`, which changes the checkpoint's own
repulsion; with `"place": "image"` beside it the push acts elsewhere (see `places`).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product

from repulsion import Repulsion
from repulsion.objectives import NAMES
from sampler import Pipeline
from sampler.methods import METHODS

from ..prompts import OPEN, full_prompts
from .places import PLACES

REGIMES = {"tiny-sd3": "guided, 20 steps", "tiny-flux": "guidance-distilled, 20 steps", "tiny-turbo": "4 steps"}
BUDGET = 12  # settings that each method may try on each checkpoint
GROUP = 4  # pictures, as in the paper
FULL = full_prompts(30)
BATCHES = {2: 8, 4: 4, 8: 2, 16: 1, 32: 1}  # pictures → seeds, so that small batches are measured on as many pictures
SHIPPED = [{}, {"repulsion": {}}]  # without and with repulsion as the checkpoint ships it
KNOBS = "strength", "η"
ETAS = "1e4", "3e4", "1e5", "3e5", "1e6", "1e7"  # at which something happens on at least one checkpoint


@dataclass(frozen=True)
class Size:
    """How much of the plan is painted."""

    effect: list[str]  # prompts for the shipped settings
    seeds: int  # for each of them
    settings: int  # of each method
    fronts: list[str]  # prompts for these
    ablations: tuple[str, ...] | None  # None: all
    ablated: list[str]  # prompts for each row of an ablation
    rest: bool = False  # full prompts, and larger batches


SIZES = {
    "full": Size(OPEN, 5, BUDGET, OPEN, None, OPEN, rest=True),
    "small": Size(OPEN, 5, 3, OPEN[3::3], ("blocks", "place", "objective", *KNOBS),
                  [prompt for i, prompt in enumerate(OPEN) if i % 4]),
    "quick": Size(OPEN[::5], 1, 3, OPEN[::5], KNOBS, OPEN[::5]),
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


@cache
def pipeline_of(model: str) -> Pipeline:
    return Pipeline.load(model)


def call_of(setting: dict, pipeline: Pipeline) -> dict:
    """The keyword arguments of a pipeline call for a setting. Raises TypeError or ValueError for a wrong one."""
    call = {name: value for name, value in setting.items() if name in ("guidance", "steps")}
    if "repulsion" in setting:
        call["repulsion"] = changed(pipeline.defaults.repulsion, setting["repulsion"])
    if "method" in setting:
        rest = {name: value for name, value in setting.items() if name not in ("method", *call)}
        call["method"] = METHODS[setting["method"]](**rest)
    return call


def changed(repulsion: Repulsion, change: dict) -> Repulsion:
    """The repulsion with some fields replaced; a scale takes the place of a strength, and the other way round."""
    neither = {"strength": None, "scale": None} if {"strength", "scale"} & change.keys() else {}
    return replace(repulsion, **neither | change)


def early(model: str) -> int:
    """τ: repel in the first fifth of the steps, at least in one."""
    return max(1, pipeline_of(model).defaults.steps // 5)


def guided(model: str) -> bool:
    """Whether the checkpoint's own guidance can be lowered."""
    return (pipeline_of(model).defaults.guidance or 1) > 1


# all blocks and both branches, as in the paper, and two that push less of the model
WHERE = [{"blocks": "all", "branches": "all"}, {"blocks": "first", "branches": "conditional"},
         {"blocks": "middle", "branches": "conditional"}]


def push(model: str, where: dict = WHERE[0], **length: float) -> dict:
    """One gradient step in each early denoising step, as long as a strength or a scale says."""
    return {**where, "iterations": 1, "steps": early(model), **length}


def tried(method: str, names: str, first: Iterable[tuple], others: Iterable[tuple]) -> list[dict]:
    """The settings of a rival: `first` served best in earlier experiments, small sizes paint these alone."""
    rows = [*(first := list(first)), *[row for row in others if row not in first]]
    return [{"method": method, **dict(zip(names.split(), row, strict=True))} for row in rows]


STRENGTHS = {  # rivals with one setting: name → method, the strengths to try first, and all
    "DAVE": ("dave", [0.5, 1.0, 1.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0]),
    "STRIDE": ("stride", [0.25, 0.35, 0.5], [0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0]),
    "coupled noise": ("coupled", [0.25, 0.5, 1.0], [round(twelfth / 12, 3) for twelfth in range(1, 13)]),
    "pink noise": ("pink", [0.1, 0.2, 0.4], [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5]),
    "seed variance": ("seedvariance", [1.0, 2.0, 3.0], [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0]),
    "CNO": ("cno", [0.1, 0.3, 0.5], [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5]),
}


def fronts(model: str) -> dict[str, list[dict]]:
    """Method → BUDGET settings, for all the same effort. Guidance can be lowered only where there is some."""
    pushes = [push(model, where, strength=s) for where, s in product(WHERE, [0.5, 1.0, 2.0, 4.0])]
    found = {
        "contextual repulsion": [{"repulsion": push} for push in pushes],
        "away from the mean": [{"repulsion": {**push, "objective": "spread"}} for push in pushes],
        "image-token repulsion": [{"repulsion": push, "place": "image"} for push in pushes],
        "CADS": tried("cads", "strength start stop", [(0.5, 0.6, 1.0), (1.0, 0.6, 1.0), (0.25, 0.5, 0.9)],
                      [(s, *ends) for s in (0.1, 0.25, 0.5, 1.0) for ends in ((0.3, 0.8), (0.5, 0.9), (0.6, 1.0))]),
        "particle guidance": tried("particle", "strength low", [(0.1, 0.0), (0.3, 0.0), (0.3, 0.5)],
                                   product([0.03, 0.1, 0.3, 1.0, 3.0, 10.0], [0.0, 0.5])),
        "SPARKE": tried("sparke", "strength every", [(0.05, 1), (0.1, 2), (0.2, 4)],
                        product([0.05, 0.1, 0.2, 0.4], [1, 2, 4])),
        "DiverseFlow": tried("diverseflow", "strength", [(0.2,), (0.5,), (2.0,)],
                             product([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0])),
        "group selection": tried("sgi", "strength pruning", [(3.0, 0.25), (3.0, 0.5), (3.0, 0.9)],
                                 product([1.0, 3.0, 7.0, 15.0], [0.25, 0.5, 0.9])),
        "Feature Self-Guidance": tried("fsg", "strength block", [(0.1, 1), (0.25, 1), (0.25, 2)],
                                       product([0.05, 0.1, 0.25, 0.5, 1.0, 2.0], [1, 2])),
        **{name: tried(method, "strength", product(first), product(others))
           for name, (method, first, others) in STRENGTHS.items()},
    }
    if guided(model):
        above = pipeline_of(model).defaults.guidance - 1  # guidance 1 is the prompt alone
        twelfths = 0, 4, 8, 1, 2, 3, 5, 6, 7, 9, 10, 11
        found["lower guidance"] = [{"guidance": round(1 + above * twelfth / 12, 3)} for twelfth in twelfths]
        found["interval guidance"] = tried("interval", "strength low", [(0.1, 0.0), (0.2, 0.0), (0.4, 0.2)],
                                           product([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0, 0.2]))
    else:
        found["first step from the teacher"] = tried("teacher", "strength weight", [(1.0, 3.0), (4.0, 3.0), (4.0, 1.0)],
                                                     product([1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 3.0]))
    return found


def ablations(model: str) -> dict[str, dict[str, dict]]:
    """Experiment → row → setting: contextual repulsion as shipped but for one thing, and in `KNOBS` the length of
    the same push on all checkpoints."""
    own, steps, fifth = pipeline_of(model).defaults.repulsion, pipeline_of(model).defaults.steps, early(model)

    def but(**change) -> dict:  # a row that is as shipped shares its groups
        return {"repulsion": {name: value for name, value in change.items() if getattr(own, name) != value}}

    found = {
        "blocks": {name: but(blocks=name) for name in ("first", "middle", "last", "all")},
        "steps": {f"{i + 1} to {i + fifth}": but(start=i, steps=fifth) for i in range(0, steps, fifth)}
        | {"all": but(start=0, steps=steps)},
        "place": {"attention": but(), **{place: {**but(), "place": place} for place in PLACES}},
        "objective": {name: but(objective=name) for name in NAMES},
        "M": {f"{m}": but(iterations=m) for m in (1, 5, 20, 50)},
        "strength": {f"{s}": {"repulsion": push(model, strength=s)} for s in (0.5, 1.0, 2.0)},
        "η": {eta: {"repulsion": push(model, scale=float(eta))} for eta in ETAS},
    }
    if model == "tiny-sd3":
        found["branches"] = {name: but(branches=name) for name in ("all", "conditional")}
    if model == "tiny-flux":
        found["single-stream tokens"] = {name: but(single_stream_tokens=name) for name in ("all", "context", "none")}
    return found


def jobs(models: list[str], size: Size) -> list[Job]:
    """All groups, checkpoint by checkpoint."""
    found: list[Job] = []

    def add(model: str, method: str, setting: dict, prompts: list[str], seeds: int = 1, images: int = GROUP) -> None:
        found.extend(Job(model, method, json.dumps(setting), prompt, seed, images)
                     for seed in range(seeds) for prompt in prompts)

    for model in models:
        for setting in SHIPPED:
            add(model, "contextual repulsion" if setting else "base", setting, size.effect, size.seeds)
        for method, settings in fronts(model).items():
            for setting in settings[: size.settings]:
                add(model, method, setting, size.fronts)
        for name, rows in ablations(model).items():
            if size.ablations is None or name in size.ablations:
                for setting in rows.values():
                    add(model, name, setting, size.ablated)
        if size.rest:
            for setting in told_everything(model):
                add(model, "full prompts", setting, FULL)
            add(model, "batch", {}, OPEN, images=max(BATCHES))  # what does not repel is the same in any batch
            for images, seeds in BATCHES.items():
                add(model, "batch", {"repulsion": {}}, OPEN, seeds, images)
    return list({job.key: job for job in found}.values())


def told_everything(model: str) -> list[dict]:
    """What full prompts are painted with: as shipped, and without guidance, the simplest rival."""
    return [*SHIPPED, {"guidance": 1.0}] if guided(model) else SHIPPED
