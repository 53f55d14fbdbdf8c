"""From rows of raw results to numbers: which settings are chosen, and what they come to. Nothing here paints."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean as mean

import torch
from torch import Tensor

from tiny.captions import parse
from tiny.reader import adherence
from tiny.world import render, sample_scene

from ..prompts import CHOICE
from .embedding import Embedding
from .measures import Interval, interval, kernel_distance, to_scene, values_reached, vectors_of
from .plan import FULL, GROUP, ablations, by_strength, pipeline_of, settings

ALLOWED = 1, 2, 3  # points of adherence that a chosen setting may lose
MIDDLE = 2  # of these, the one that methods are ranked at
OURS = "contextual repulsion"
RENDERS = 32  # for each prompt, what KID compares with


@dataclass(frozen=True)
class Result:
    """A setting in numbers, against the base on the same prompts and seeds.

    gain, gain_embedding: Vendi score over the base's; adherence: its change, in points of 100; wrong_pixels: its
    change, of 10,000; coverage: share of the open values; kid: distance to renders of what the prompts ask; groups: how
    many it was measured on
    """

    setting: dict
    gain: Interval
    gain_embedding: Interval
    adherence: Interval
    wrong_pixels: Interval
    coverage: float
    kid: float
    groups: int


def choose(tried: Iterable[tuple[dict, float, float]], points: float) -> dict | None:
    """Of (setting, gain, points of adherence lost) the setting with the largest gain that loses at most `points`."""
    admissible = [(gain, setting) for setting, gain, lost in tried if lost <= points + 1e-9]  # 1e-9: rounding
    return max(admissible, key=lambda one: one[0])[1] if admissible else None


class Results:
    """All rows, found by what was asked for; those of the prompts to choose on and of full prompts apart."""

    def __init__(self, rows: Iterable[dict]):
        self.rows: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
        self.known: dict[tuple, Result | None] = {}
        for row in rows:
            of = "choice" if row["prompt"] in CHOICE else "full" if row["prompt"] in FULL else "open"
            self.rows[row["model"], json.dumps(row["setting"]), row["images"], of][row["prompt"], row["seed"]] = row

    def groups(self, model: str, setting: dict, images: int = GROUP, of: str = "open") -> dict[tuple, dict]:
        """(prompt, seed) → row, of "open" prompts, those to report, of "choice" or of "full" ones."""
        return self.rows.get((model, json.dumps(setting), images, of), {})

    def tried(self, model: str, method: str) -> list[tuple[dict, float, float]]:
        """What to choose from: of each setting of a method its gain and the points of adherence that it loses.

        Means over the groups, of the prompts to choose on, that the base and all painted settings have. The base's is
        the mean of what it comes to on these groups and on all of the same prompts: with a correlation of about a half
        between groups of the same noise, neither alone is as close.
        """
        rows = [(setting, self.groups(model, setting, of="choice")) for setting in settings(model).get(method, [])]
        rows, base = [(setting, found) for setting, found in rows if found], self.groups(model, {}, of="choice")
        common = sorted(set(base).intersection(*[found for _, found in rows]))

        def sum_of(name: str, found: dict) -> float:
            return sum(found[key][name] for key in common)

        def of_base(name: str) -> float:
            of_all = [mean([row[name] for (other, _), row in base.items() if other == prompt]) for prompt, _ in common]
            return (sum_of(name, base) + sum(of_all)) / 2
        vendi, kept = of_base("vendi"), of_base("adherence")
        return [(setting, sum_of("vendi", found) / vendi, 100 * (kept - sum_of("adherence", found)) / len(common))
                for setting, found in rows if common]

    def finalists(self, model: str, method: str) -> list[dict]:
        """The settings chosen for any of ALLOWED, each once, that for MIDDLE first."""
        tried = self.tried(model, method)
        chosen = [choose(tried, points) for points in sorted(ALLOWED, key=lambda points: points != MIDDLE)]
        return [one for i, one in enumerate(chosen) if one is not None and one not in chosen[:i]]

    def verdict(self, model: str) -> dict[str, dict[int, Result | None]]:
        """Method → points of ALLOWED → what was chosen for these came to, on the prompts to report.

        None where no setting was admissible; the points are left out where the chosen one is not painted yet.
        """
        found: dict[str, dict[int, Result | None]] = {}
        for method in settings(model):
            tried, measured = self.tried(model, method), {}
            for points in ALLOWED if tried else ():
                setting = choose(tried, points)
                result = None if setting is None else self.result(model, setting)
                if setting is None or result:
                    measured[points] = result
            if measured:
                found[method] = measured
        return found

    def ranked(self, model: str, points: int = MIDDLE) -> dict[str, Result]:
        """Method → what it comes to at so many points lost, the largest gain first; without those that have nothing."""
        found = {method: one[points] for method, one in self.verdict(model).items() if one.get(points)}
        return dict(sorted(found.items(), key=lambda item: -item[1].gain[0]))

    def pairs(self, model: str, setting: dict, only: set[tuple] | None) -> dict[str, list[tuple]]:
        """Prompt → (row, row of the base) of each group that both have; `only`: of these groups."""
        mine, other, found = self.groups(model, setting), self.groups(model, {}), defaultdict(list)
        for prompt, seed in sorted(set(mine) & set(other)):
            if only is None or (prompt, seed) in only:
                found[prompt].append((mine[prompt, seed], other[prompt, seed]))
        return found

    def ahead(self, model: str, setting: dict) -> Interval | None:
        """The gain of contextual repulsion over that of a setting, where both lose as much adherence.

        What contextual repulsion loses is taken to be proportional to its strength (`per_strength`); its gain lies on
        straight lines between the strengths, from the base on, and goes no further than the largest. On the groups
        that all of them have; None for none.
        """
        own = {one["repulsion"]["strength"]: groups for one in by_strength(model)
               if (groups := self.groups(model, one))}
        by_prompt = defaultdict(list)
        found = [self.groups(model, {}), self.groups(model, setting), *own.values()]
        for prompt, seed in sorted(set.intersection(*map(set, found))):
            rows = [groups[prompt, seed] for groups in found]
            by_prompt[prompt].append([row[name] for name in ("vendi", "adherence") for row in rows])
        strengths = torch.tensor([0.0, *own], dtype=torch.float64)

        def ratio(means: Tensor) -> Tensor:
            vendi, kept = means.unflatten(-1, (2, -1)).unbind(-2)
            gain, lost = vendi / vendi[..., :1], kept[..., :1] - kept
            rate = per_strength(strengths[1:], lost[..., 2:]).clamp(min=1e-9)  # above 0: it may be measured as none
            line = torch.cat([gain[..., :1], gain[..., 2:]], dim=-1)
            return interpolate(lost[..., 1].clamp(min=0) / rate, strengths, line) / gain[..., 1]
        if not own or not by_prompt:
            return None
        return interval([torch.tensor(rows, dtype=torch.float64) for rows in by_prompt.values()], ratio)

    def beside(self, model: str) -> dict[str, tuple[Result, Interval]]:
        """Every other method → what the first of its finalists came to, and contextual repulsion over it (`ahead`)."""
        found = {}
        for method in settings(model):
            for setting in self.finalists(model, method)[:1] if method != OURS else ():
                result, ahead = self.result(model, setting), self.ahead(model, setting)
                if result and ahead:
                    found[method] = result, ahead
        return found

    def result(self, model: str, setting: dict, only: set[tuple] | None = None) -> Result | None:
        """What a setting came to, on the groups that the base has as well; None for none. `only`: on these groups."""
        which = model, json.dumps(setting), only and frozenset(only)
        if which not in self.known:
            size = pipeline_of(model).defaults.height
            self.known[which] = compare(setting, self.pairs(model, setting, only), size)
        return self.known[which]

    def ablation(self, model: str, name: str) -> dict[str, Result]:
        """Row → what it came to, all on the groups that every painted row has; empty where only one was painted."""
        rows = {row: setting for row, setting in ablations(model).get(name, {}).items() if self.groups(model, setting)}
        common = set(self.groups(model, {})).intersection(*[self.groups(model, setting) for setting in rows.values()])
        found = {row: self.result(model, setting, common) for row, setting in rows.items()}
        return {row: result for row, result in found.items() if result} if len(found) > 1 else {}


def per_strength(strengths: Tensor, lost: Tensor) -> Tensor:
    """What is lost for each unit of strength, by least squares: strengths (k,), lost (…, k) → (…).

    One strength's loss is known to about a point; on all checkpoints those of four are proportional within that.
    """
    return lost @ strengths / strengths.square().sum()


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """What ys (…, k) are at x (…), linear between rising xs (k,); at their ends what they are there."""
    i = torch.bucketize(x, xs).clamp(1, len(xs) - 1)
    y0, y1 = (ys.gather(-1, (i + d)[..., None])[..., 0] for d in (-1, 0))
    return torch.lerp(y0, y1, ((x - xs[i - 1]) / (xs[i] - xs[i - 1])).clamp(0, 1))


def columns_of(groups: list[tuple[dict, dict]], names: Sequence[str]) -> Tensor:
    """The measures of a prompt's groups, then those of their bases: (n, 2 · names)."""
    numbers = [[row[name] for row in pair for name in names] for pair in groups]
    return torch.tensor(numbers, dtype=torch.float64)


def compare(setting: dict, pairs: dict[str, list[tuple[dict, dict]]], size: int) -> Result | None:
    """The numbers of `Results.pairs`, of pictures with sides of `size` pixels."""
    if not pairs:
        return None
    by_prompt = [columns_of(groups, ("vendi", "vendi_embedding", "adherence", "wrong_pixels"))
                 for groups in pairs.values()]  # (n, 8)
    reached = [values_reached(prompt, [to_scene(text) for row, _ in groups for text in row["scenes"]])
               for prompt, groups in pairs.items()]
    vectors = torch.cat([vectors_of(row) for groups in pairs.values() for row, _ in groups])
    return Result(
        setting,
        interval(by_prompt, lambda m: m[..., 0] / m[..., 4]),
        interval(by_prompt, lambda m: m[..., 1] / m[..., 5]),
        interval(by_prompt, lambda m: 100 * (m[..., 2] - m[..., 6])),
        interval(by_prompt, lambda m: m[..., 3] - m[..., 7]),
        mean(reached),
        kernel_distance(vectors, torch.cat([renders(prompt, size) for prompt in pairs])),
        len(vectors) // GROUP,
    )  # fmt: skip


@cache
def renders(prompt: str, size: int) -> Tensor:
    """Embeddings of pictures that show what a prompt asks and are otherwise as the world makes them."""
    rng, asked, scenes = random.Random(f"renders of {prompt}"), parse(prompt), []
    while len(scenes) < RENDERS:
        scene = sample_scene(rng)
        if len(scene.things) == len(asked.things) and adherence(asked, scene) == 1:
            scenes.append(scene)
    return Embedding.load()(render(scenes, size=size)).double()
