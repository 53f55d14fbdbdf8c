"""Which groups of pictures are painted: every method in every regime with the same number of settings, and ablations.

A setting says in JSON what a call of the pipeline has beside the checkpoint's defaults: `{"guidance": 2}`,
`{"method": "cads", "strength": 0.5}`, or `{"repulsion": {"diversity": 0.5}}`, which changes the checkpoint's own.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product

from repulsion import Repulsion
from sampler import Pipeline
from sampler.methods import METHODS

from ..prompts import OPEN, full_prompts

REGIMES = {"tiny-sd3": "guided, 20 steps", "tiny-flux": "guidance-distilled, 20 steps", "tiny-turbo": "4 steps"}
BUDGET = 12  # settings that each method may try in each regime
GROUP = 4  # pictures, as in the paper
FULL = full_prompts(30)
SCREEN = OPEN[1::3]  # the prompts of the first round, in which all settings are tried once
FINAL_SEEDS = 2  # of the second, in which a method's best settings see all prompts


@dataclass(frozen=True)
class Job:
    """One group to be painted and measured. `setting` is JSON text; `part` is the experiment that asks for it."""

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
    return replace(repulsion, **({"strength": None, "scale": None} if {"strength", "scale"} & change.keys() else {}) | change)


def grid(**values: list) -> list[dict]:
    """Every combination of the values of each name."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


DOSES = [0.25, 0.5, 0.75, 0.95]
PLACES = [  # the paper's, and two that act on what leaves a block
    {"site": "attention", "blocks": "all", "branches": "all"},
    {"site": "block", "blocks": "first", "branches": "conditional"},
    {"site": "block", "blocks": "middle", "branches": "conditional"},
]
NEUTRAL = {"site": "block", "blocks": "all", "branches": "all", "iterations": 2}  # where the knob is compared with η
AS_PUBLISHED = {"site": "attention", "blocks": "all", "branches": "all", "iterations": 10}
DECADES = range(4, 9)  # of η


def early(model: str) -> int:
    """τ: repel in the first fifth of the steps."""
    return 1 if model == "tiny-turbo" else 4


def fronts(model: str) -> dict[str, list[dict]]:
    """Method → BUDGET settings each; the same effort for all. Guidance can be lowered only where there is some."""
    pushes = [{**place, "iterations": 1, "diversity": dose, "steps": early(model)}
              for place, dose in product(PLACES, DOSES)]
    found = {
        "contextual repulsion": [{"repulsion": push} for push in pushes],
        "image-token repulsion": [{"repulsion": {**push, "tokens": "image"}} for push in pushes],
        "CADS": [{"method": "cads", "strength": s, "start": low, "stop": high}
                 for s, (low, high) in product([0.1, 0.25, 0.5, 1.0], [(0.3, 0.8), (0.5, 0.9), (0.6, 1.0)])],
        "particle guidance": grid(method=["particle"], strength=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0], low=[0.0, 0.5]),
        "SPARKE": grid(method=["sparke"], strength=[0.05, 0.1, 0.2, 0.4], every=[1, 2, 4]),
        "DiverseFlow": grid(method=["diverseflow"],
                            strength=[0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]),
        "group selection": grid(method=["sgi"], strength=[1.0, 3.0, 7.0, 15.0], pruning=[0.25, 0.5, 0.9]),
    }
    if model != "tiny-turbo":
        weights = [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0]
        found["lower guidance"] = [{"guidance": w} for w in weights]
        found["interval guidance"] = grid(method=["interval"], strength=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], low=[0.0, 0.2])
    return found


def ablations(model: str) -> dict[str, dict[str, dict]]:
    """Experiment → its rows: what contextual repulsion does when one thing about it changes."""
    fifth, count = early(model), {"tiny-sd3": 5, "tiny-flux": 5, "tiny-turbo": 4}[model]
    starts = {f"steps {i * fifth + 1} to {(i + 1) * fifth}": {"start": i * fifth, "steps": fifth} for i in range(count)}
    found = {
        "blocks": {name: {"blocks": name} for name in ("first", "middle", "last", "all")},
        "steps": {**starts, "all steps": {"start": 0, "steps": count * fifth}},
        "site": {name: {"site": name} for name in ("attention", "block")},
        "tokens": {name: {"tokens": name, "site": "attention"} for name in ("context", "image", "scores")},
        "M": {f"{m}": {"iterations": m} for m in (1, 2, 5, 20)},
        "η, as published": {f"1e{k}": {**AS_PUBLISHED, "steps": fifth, "scale": 10.0**k} for k in DECADES},
        "η": {f"1e{k}": {**NEUTRAL, "steps": fifth, "scale": 10.0**k} for k in DECADES},
        "knob": {f"{d}": {**NEUTRAL, "steps": fifth, "diversity": d} for d in (0.25, 0.5, 0.75)},
    }
    if model == "tiny-sd3":
        found["branches"] = {name: {"branches": name} for name in ("all", "conditional")}
    if model == "tiny-flux":
        found["single-stream tokens"] = {name: {"single_stream_tokens": name, "blocks": "all"}
                                         for name in ("all", "context", "none")}
    return {name: {row: {"repulsion": change} for row, change in rows.items()} for name, rows in found.items()}


BATCHES = {2: 8, 4: 4, 8: 2, 16: 1, 32: 1}  # pictures → seeds, so that small batches are measured on as many pictures
SHIPPED = [{}, {"repulsion": {}}]  # without and with repulsion as the checkpoint ships it


def told_everything(model: str) -> list[dict]:
    """What full prompts are painted with: as shipped, and with less guidance, the simplest rival."""
    return SHIPPED + ([{"guidance": 1.0}, {"guidance": 2.0}] if model != "tiny-turbo" else [])


def jobs(models: list[str], quick: bool) -> list[Job]:
    """All groups of the first round, regime by regime. `quick`: four prompts, and three settings of each method."""
    few, all_prompts, final_seeds = (OPEN[::5], OPEN[::5], 1) if quick else (SCREEN, OPEN, FINAL_SEEDS)
    found: list[Job] = []

    def add(model: str, method: str, setting: dict, prompts: list[str], seeds: int = 1, images: int = GROUP) -> None:
        found.extend(Job(model, method, json.dumps(setting), prompt, seed, images)
                     for seed in range(seeds) for prompt in prompts)

    for model in models:
        for setting in SHIPPED:
            add(model, "contextual repulsion" if setting else "base", setting, all_prompts, final_seeds)
        for method, settings in fronts(model).items():
            for setting in settings[1::4] if quick else settings:
                add(model, method, setting, few)
        for name, rows in ablations(model).items():
            if name == "knob" or not quick:
                for setting in rows.values():
                    add(model, name, setting, all_prompts)
        if not quick:
            for setting in told_everything(model):
                add(model, "full prompts", setting, FULL)
            add(model, "batch", {}, OPEN, images=max(BATCHES))  # what does not repel is the same in any batch
            for images, seeds in BATCHES.items():
                add(model, "batch", {"repulsion": {}}, OPEN, seeds, images)
    return list({job.key: job for job in found}.values())


def in_first_round(row: dict) -> bool:
    """Whether a row of results counts where a method's best settings are chosen: those of the second do not."""
    return row["prompt"] in SCREEN and row["seed"] == 0


def finalists(best: dict[tuple[str, str], list[dict]]) -> list[Job]:
    """The second round: all prompts and two seeds for a method's best settings; (model, method) → settings."""
    return [Job(model, method, json.dumps(setting), prompt, seed) for (model, method), settings in best.items()
            for setting in settings for seed in range(FINAL_SEEDS) for prompt in OPEN]
