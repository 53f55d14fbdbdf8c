"""From rows of raw results to numbers: which settings are chosen, and what they come to. Nothing here paints."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tiny.captions import parse
from tiny.reader import adherence
from tiny.world import render, sample_scene

from ..prompts import CHOICE
from .embedding import Embedding
from .measures import Interval, interval, kernel_distance, mean, to_scene, values_reached, vectors_of
from .plan import FULL, GROUP, ablations, but, pipeline_of, settings

ALLOWED = 1, 2, 3  # points of adherence that a chosen setting may lose
MIDDLE = 2  # of these, the one that methods are ranked at
OURS = "contextual repulsion"
RENDERS = 64  # for each prompt, what KID compares with
MEASURES = "vendi", "vendi_embedding", "adherence", "wrong_pixels"


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
        for row in rows:
            of = "choice" if row["prompt"] in CHOICE else "full" if row["prompt"] in FULL else "open"
            self.rows[row["model"], json.dumps(row["setting"]), row["images"], of][row["prompt"], row["seed"]] = row

    def groups(self, model: str, setting: dict, images: int = GROUP, of: str = "open") -> dict[tuple, dict]:
        """(prompt, seed) → row, of "open" prompts, those to report, of "choice" or of "full" ones."""
        return self.rows.get((model, json.dumps(setting), images, of), {})

    def tried(self, model: str, method: str) -> list[tuple[dict, float, float]]:
        """What to choose from: of each setting of a method its gain and the points of adherence that it loses.

        Means over the groups, of the prompts to choose on, that the base and all painted settings have.
        """
        rows = [(setting, self.groups(model, setting, of="choice")) for setting in settings(model).get(method, [])]
        rows, base = [(setting, found) for setting, found in rows if found], self.groups(model, {}, of="choice")
        common = set(base).intersection(*[found for _, found in rows])

        def sum_of(name: str, found: dict) -> float:
            return sum(found[key][name] for key in sorted(common))
        return [(setting, sum_of("vendi", found) / sum_of("vendi", base),
                 100 * (sum_of("adherence", base) - sum_of("adherence", found)) / len(common))
                for setting, found in rows if common]

    def finalists(self, model: str, method: str) -> list[dict]:
        """The settings chosen for any of ALLOWED, each once."""
        tried = self.tried(model, method)
        chosen = [choose(tried, points) for points in ALLOWED]
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

    def result(self, model: str, setting: dict, only: set[tuple] | None = None,
               base: dict | None = None) -> Result | None:
        """What a setting came to against the base, or against another setting `base`, on the groups that both have.

        None where there are none; `only`: on these groups.
        """
        mine, other = self.groups(model, setting), self.groups(model, base or {})
        both = [key for key in mine if key in other and (only is None or key in only)]
        if not both:
            return None
        pairs = defaultdict(list)
        for key in both:
            pairs[key[0]].append([[row[name] for name in MEASURES] for row in (mine[key], other[key])])
        by_prompt = [torch.tensor(groups, dtype=torch.float64).flatten(1) for groups in pairs.values()]  # (n, 8)
        shown = {prompt: [to_scene(text) for key in both if key[0] == prompt for text in mine[key]["scenes"]]
                 for prompt in pairs}
        size = pipeline_of(model).defaults.height
        return Result(
            setting,
            interval(by_prompt, lambda m: m[..., 0] / m[..., 4]),
            interval(by_prompt, lambda m: m[..., 1] / m[..., 5]),
            interval(by_prompt, lambda m: 100 * (m[..., 2] - m[..., 6])),
            interval(by_prompt, lambda m: m[..., 3] - m[..., 7]),
            mean([values_reached(prompt, scenes) for prompt, scenes in shown.items()]),
            kernel_distance(torch.cat([vectors_of(mine[key]) for key in both]), renders(tuple(sorted(pairs)), size)),
            len(both),
        )  # fmt: skip

    def ablation(self, model: str, name: str) -> dict[str, Result]:
        """Row → what it came to, all on the groups that every painted row has; empty where only one was painted."""
        rows = {row: setting for row, setting in ablations(model).get(name, {}).items() if self.groups(model, setting)}
        common = set(self.groups(model, {})).intersection(*[self.groups(model, setting) for setting in rows.values()])
        found = {row: self.result(model, setting, common) for row, setting in rows.items()}
        return {row: result for row, result in found.items() if result} if len(found) > 1 else {}

    def shipped(self, model: str) -> Result | None:
        """What repulsion comes to as the checkpoint ships it."""
        return self.result(model, but(model))


@cache
def renders(prompts: tuple[str, ...], size: int) -> Tensor:
    """Embeddings of pictures that show what the prompts ask and are otherwise as the world makes them."""
    rng, embedding, found = random.Random("renders"), Embedding.load(), []
    for prompt in prompts:
        asked, scenes = parse(prompt), []
        while len(scenes) < RENDERS:
            scene = sample_scene(rng)
            if adherence(asked, scene) == 1:
                scenes.append(scene)
        found.append(embedding(render(scenes, size=size)).double())
    return torch.cat(found)
