"""The experiments: their measures against hand-made cases, their plan, and a run that is stopped and goes on."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from scenes import scenes_of

from benchmarks.paper import measures, plan, tables
from benchmarks.paper.__main__ import main
from benchmarks.paper.embedding import Embedding
from benchmarks.paper.places import PLACES
from benchmarks.paper.run import finished, paint, pictures, run
from repulsion import Repulsion
from sampler import Pipeline
from tiny.world import Scene, Thing, render

ROOT = Path(__file__).parents[2]
NAVY = ("center", "navy", "plain")


def test_a_scene_survives_as_text():
    scenes = scenes_of(200, seed=1) + [Scene(), Scene((Thing("star", None, "small"),), None, "pink", None)]
    assert [measures.to_scene(measures.to_text(scene)) for scene in scenes] == scenes


def test_wrong_pixels_are_those_that_were_spoiled():
    # On fresh renders the fit is near exact: half of the pictures have none. A block of a color that the ground
    # is not, too small to pass for a thing (the reader's least is 25 pixels), counts pixel by pixel.
    pictures = render(scenes_of(100, seed=2), seed=3)
    fresh = torch.tensor(measures.wrong_pixels(pictures)).double()
    assert fresh.median() == 0 and fresh.mean() < 2
    plain = render([Scene((Thing("circle", "red", "medium"),), *NAVY)] * 3)
    for i, side in enumerate((2, 3, 4)):
        plain[i, :, 4 : 4 + side, 4 : 4 + side] = 1
    assert measures.wrong_pixels(plain) == [4, 9, 16]


def test_a_torn_thing_counts_about_what_it_lacks():
    whole = render([Scene((Thing("square", "white", "large"),), *NAVY)], seed=None)
    torn = whole.clone()
    torn[:, :, 32:, 32:] = whole[:, :, :1, :1]  # a quarter of 30 x 30 pixels gone
    (found,) = measures.wrong_pixels(torn)
    assert measures.wrong_pixels(whole) == [0] and 0.5 * 225 < found < 2 * 225


def test_coverage_counts_what_the_prompt_leaves_open():
    circle = [Scene((Thing("circle", color, "small"),), "left", "navy", "plain") for color in ("red", "blue")]
    # colors 2 of 7, sizes 1 of 3, arrangements 1 of 5, grounds 1 of 6, textures 1 of 4
    assert measures.values_reached("a circle", circle) == pytest.approx((2 / 7 + 1 / 3 + 1 / 5 + 1 / 6 + 1 / 4) / 5)
    reached = measures.values_reached("a circle on a plain navy ground", circle)
    assert reached == pytest.approx((2 / 7 + 1 / 3 + 1 / 5) / 3)
    assert measures.values_reached("a small red circle on the left on a plain navy ground", circle) == 1


def test_vendi_of_pairs_runs_from_one_to_two():
    one, other = scenes_of(1, seed=4)[0], Scene((Thing("star", "blue", "small"), Thing("ring", "red", "large")))
    assert measures.vendi_of_pairs([one] * 4) == pytest.approx(1)
    strangers = [Scene((Thing(shape, color, size),), place, ground, texture) for shape, color, size, place, ground,
                 texture in (("star", "red", "small", "left", "navy", "plain"),
                             ("ring", "blue", "large", "top", "pink", "dotted"))]
    # all but the number of things differ, one attribute of seven: λ = 1/2 ± 1/14
    high, low = 0.5 + 0.5 / 7, 0.5 - 0.5 / 7
    assert measures.vendi_of_pairs(strangers) == pytest.approx(math.exp(-high * math.log(high) - low * math.log(low)))
    assert measures.vendi_of_pairs([one, one, other]) < 2


def test_kid_is_the_unbiased_sum_over_pairs():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), 2 + torch.randn(4, 3, dtype=torch.float64)

    def k(a, b):
        return (a.dot(b).item() / 3 + 1) ** 3

    own = sum(k(x[i], x[j]) for i, j in product(range(5), range(5)) if i != j) / 20
    other = sum(k(y[i], y[j]) for i, j in product(range(4), range(4)) if i != j) / 12
    across = sum(k(a, b) for a, b in product(x, y)) / 20
    assert measures.kernel_distance(x, y) == pytest.approx(own + other - 2 * across, rel=1e-12)


def test_kid_of_one_world_is_small_and_of_two_is_not():
    embedding = Embedding.load()
    one, two = (embedding(render(scenes_of(300, seed=s), seed=s)).double() for s in (5, 6))
    circles = [s for s in scenes_of(3000, seed=7) if len(s.things) == 1 and s.things[0].shape == "circle"][:200]
    same = measures.kernel_distance(one, two)
    different = measures.kernel_distance(one, embedding(render(circles)).double())
    assert abs(same) < 0.1 and different > 10 * abs(same)


def test_intervals_are_as_wide_as_the_normal_law_says():
    torch.manual_seed(1)
    values = torch.randn(400, 1, 1, dtype=torch.float64)  # prompts, groups, numbers
    middle, low, high = measures.bootstrap(list(values), lambda m: m[..., 0])
    assert middle == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)  # 2,000 draws: 3 % a side
    constant = [torch.full((3, 2), 5.0)] * 4
    assert measures.bootstrap(constant, lambda m: m[..., 0] / m[..., 1]) == (1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the plan


@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_method_may_try_as_much_as_every_other(model):
    for method, settings in plan.fronts(model).items():
        assert len({json.dumps(s, sort_keys=True) for s in settings}) == len(settings) == plan.BUDGET, method


@pytest.mark.parametrize("size", plan.SIZES)
@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_setting_is_a_call_and_no_group_is_planned_twice(model, size):
    pipeline = Pipeline.load(model)
    found = plan.jobs([model], plan.SIZES[size])
    assert len({job.key for job in found}) == len(found)
    for setting in map(json.loads, {job.setting for job in found}):
        call = plan.call_of(setting, pipeline)
        assert call.keys() <= {"guidance", "repulsion", "method", "steps"} and bool(call) == bool(setting)
        assert setting.get("place", "image") in PLACES


@pytest.mark.parametrize("model", plan.REGIMES)
def test_the_full_plan_goes_on_from_the_small_one(model):
    small, full = ({job.key for job in plan.jobs([model], plan.SIZES[size])} for size in ("small", "full"))
    assert small < full


def test_a_scale_takes_the_place_of_a_strength():
    changed = plan.changed(Repulsion(strength=2.0, steps=3), {"scale": 5.0, "blocks": "first"})
    assert changed == Repulsion(scale=5.0, steps=3, blocks="first")
    assert plan.changed(changed, {"strength": 1.0}) == Repulsion(strength=1.0, steps=3, blocks="first")


@pytest.mark.parametrize("model", plan.REGIMES)
def test_an_ablation_changes_one_thing(model):
    pipeline = Pipeline.load(model)
    own = asdict(pipeline.defaults.repulsion)
    for name in plan.ablations(model).keys() - plan.KNOBS:
        rows = plan.ablations(model)[name].values()
        changed = [{field for field, value in asdict(plan.call_of(row, pipeline)["repulsion"]).items()
                    if value != own[field]} | ({"place"} & row.keys()) for row in rows]
        assert all(fields <= {"start", "steps"} if name == "steps" else len(fields) <= 1 for fields in changed), name
        assert len({json.dumps(row) for row in rows}) == len(rows) and sum(map(bool, changed)) >= len(rows) - 1


def test_a_place_is_where_the_push_acts_and_nowhere_else_afterwards():
    settings = [{}, {"repulsion": {}}, {"repulsion": {}, "place": "image"}, {"repulsion": {}}]
    groups = [[picture.tobytes() for picture in pictures("tiny-turbo", setting, "a circle", seed=0, images=2)]
              for setting in settings]
    assert groups[1] == groups[3] and len({str(group) for group in groups}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# the run and its tables


def some_jobs(count=3):
    return [plan.Job("tiny-sd3", "base", '{"steps": 1}', "a circle", seed, images=2) for seed in range(count)]


def without_time(row):
    return {name: value for name, value in row.items() if name != "milliseconds"}


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    file = tmp_path_factory.mktemp("paper") / "groups.jsonl"
    run(some_jobs(), file, workers=1, label="test")
    return file


def test_a_stopped_run_goes_on_and_paints_no_group_twice(painted, tmp_path):
    whole = painted.read_text()
    first, second, third = whole.splitlines(keepends=True)
    file = tmp_path / "groups.jsonl"
    file.write_text(first + third[:40])  # stopped in the middle of a line
    run(some_jobs(), file, workers=1, label="test")
    assert file.read_text().startswith(first)  # its time as well: it was not painted again
    assert len(finished(file)) == 3
    assert sorted(map(str, map(without_time, finished(file)))) == sorted(map(str, map(without_time, finished(painted))))
    before = file.read_text()
    run(some_jobs(), file, workers=1, label="test")
    assert file.read_text() == before


@pytest.fixture
def one_thread():
    """As the workers have it: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_row_comes_out_again(painted, one_thread):
    (row,) = (row for row in finished(painted) if row["seed"] == 1)
    again = json.loads(json.dumps(paint(some_jobs()[1])))
    assert without_time(again) == without_time(row)


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.paper", "--quick", "--models", "tiny-sd3",
               "--workers", "1", "--out", str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        file, deadline = tmp_path / "groups.jsonl", time.monotonic() + 120
        while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in said
    assert f"interrupted: the groups in {file} are kept" in said
    assert file.read_text().endswith("\n") and finished(file)


def test_a_report_of_nothing_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper", "--report", "--models", "tiny-sd3", "--out", str(tmp_path)])
    assert main() == 2
    assert "groups.jsonl holds no group of tiny-sd3: run without --report" in capsys.readouterr().err


def result(gain, adherence=0.0, wrong=0.0):
    def exact(value):
        return value, value, value
    return tables.Result({}, exact(gain), exact(1.0), exact(adherence), exact(wrong), 0.5, 1.0, 20)


@pytest.mark.parametrize("price", ["adherence", "wrong_pixels"])
def test_the_front_is_what_nothing_beats(price):
    torch.manual_seed(2)
    found = [result(g, -a, w) for g, a, w in torch.rand(60, 3).tolist()]

    def paid(r):
        return -r.adherence[0] if price == "adherence" else r.wrong_pixels[0]
    unbeaten = [r for r in found if not any(o.gain[0] > r.gain[0] and paid(o) < paid(r) for o in found)]
    assert tables.front(found, price) == sorted(unbeaten, key=lambda r: r.gain[0])


def test_the_best_is_the_largest_gain_that_keeps_the_prompt_or_what_loses_least_of_it():
    low, high, dear, dearer = result(1.4, 1.0), result(1.5, -2.9), result(3.0, -3.1), result(3.5, -4.0)
    assert tables.best([low, high, dear, dearer]) is tables.best_within([low, high, dear, dearer]) is high
    assert tables.best([dearer, dear]) is dear and tables.best_within([dearer, dear]) is None


def row(setting, prompt, seed, vendi, adherence, model="m"):
    group = {"vendi": vendi, "vendi_embedding": vendi, "adherence": adherence, "wrong_pixels": 10.0 * vendi}
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)).half().numpy().tobytes()
    text = [measures.to_text(scene) for scene in scenes_of(2, seed)]
    return {"model": model, "setting": setting, "images": 4, "prompt": prompt, "seed": seed, **group, "scenes": text,
            "embedding": measures.base64.b64encode(vectors).decode(), "milliseconds": 1000.0 * vendi}


def test_a_result_compares_the_same_prompts_and_seeds():
    rows = [row({}, "a circle", 0, 1.0, 1.0), row({}, "a circle", 1, 2.0, 1.0), row({}, "a star", 0, 1.0, 0.5),
            row({"guidance": 2}, "a circle", 0, 3.0, 0.75), row({"guidance": 2}, "a star", 0, 2.0, 0.5),
            row({"guidance": 2}, "a ring", 0, 9.0, 0.5)]  # no base to compare with
    found = tables.Results(rows).result("m", {"guidance": 2})
    assert found.gain[0] == pytest.approx(2.5) and found.adherence[0] == pytest.approx(-12.5)
    assert found.wrong_pixels[0] == pytest.approx(15) and found.groups == 2
    assert tables.Results(rows).result("m", {"guidance": 3}) is None


def test_rows_of_a_table_are_compared_on_the_groups_that_all_have():
    both, one = {"guidance": 2}, {"guidance": 3}
    rows = [row({}, prompt, 0, 1.0, 1.0) for prompt in ("a circle", "a star")]
    rows += [row(both, "a circle", 0, 2.0, 1.0), row(both, "a star", 0, 4.0, 1.0), row(one, "a star", 0, 3.0, 1.0)]
    found = tables.Results(rows).compared("m", {"both": both, "one": one, "never painted": {"guidance": 4}})
    assert {name: (r.gain[0], r.groups) for name, r in found.items()} == {"both": (4, 1), "one": (3, 1)}


def test_the_effect_is_stated_for_base_and_repelled():
    rows = [row(setting, prompt, seed, vendi, kept)
            for setting, vendi, kept in zip(plan.SHIPPED, (2.0, 3.0), (1.0, 0.98), strict=True)
            for prompt in ("a circle", "a star") for seed in (0, 1)]
    _, _, base, repelled = tables.effect_table(tables.Results(rows), ["m"]).splitlines()
    assert base.split(" | ")[1:4] == ["2.00 (2.00 … 2.00)", "–", "100.0% (100.0% … 100.0%)"]
    assert repelled.split(" | ")[1:3] == ["3.00 (3.00 … 3.00)", "1.50 (1.50 … 1.50)"]
    assert repelled.split(" | ")[4:] == ["-2.0 (-2.0 … -2.0)", "30 (30 … 30)", "+10 (+10 … +10)", "4 |"]
