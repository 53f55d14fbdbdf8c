"""The experiments: their plan, and a run that is stopped and goes on."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper import plan
from benchmarks.paper.__main__ import main
from benchmarks.paper.places import PLACES
from benchmarks.paper.run import finished, paint, painter, pictures
from benchmarks.prompts import CHOICE, OPEN
from sampler import Pipeline

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def all_settings(model, method):
    return plan.settings(model)[method]


def planned(model, size="full", finalists=all_settings):
    return list(plan.stages([model], plan.SIZES[size], finalists))


@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_method_may_try_as_much_as_every_other(model):
    for method, settings in plan.settings(model).items():
        assert len({json.dumps(s, sort_keys=True) for s in settings}) == len(settings) == plan.BUDGET, method
    for size in plan.SIZES:
        stages = dict(planned(model, size))
        tried = {len({job.setting for job in jobs}) for label, jobs in stages.items() if label.endswith(": choice")}
        assert tried == {plan.SIZES[size].settings}


@pytest.mark.parametrize("model", plan.REGIMES)
def test_nothing_is_reported_on_a_prompt_it_was_chosen_on(model):
    assert not {*CHOICE} & {*OPEN, *plan.FULL}
    for label, jobs in planned(model):
        prompts = {job.prompt for job in jobs if (job.method, label) != ("base", "base and as shipped")}
        assert prompts <= ({*CHOICE} if label.endswith(": choice") else {*OPEN, *plan.FULL}), label
    stages = dict(planned(model))
    both = [job.prompt for job in stages["base and as shipped"] if job.method == "base"]
    assert {*both} == {*CHOICE, *OPEN}  # the base, which is not chosen, is compared with on either half
    verdict = [job for job in stages["the rest of the verdict"] if job.method == "contextual repulsion"]
    assert len(verdict) == 200 * plan.BUDGET and len({job.key for job in verdict}) == len(verdict)
    assert len({job.key for job in stages["contextual repulsion: verdict"]} & {job.key for job in verdict}) == 100


def test_what_is_chosen_is_asked_for_when_the_settings_were_given_to_paint():
    painted = []

    def finalists(model, method):
        assert f"{method}: choice" in painted
        return []
    for label, _ in plan.stages([*plan.REGIMES], plan.SIZES["full"], finalists):
        painted.append(label)
    assert painted[0] == "base and as shipped" and painted[2] == "contextual repulsion: choice"
    assert painted[-2:] == ["batches", "the rest of the verdict"]


@pytest.mark.parametrize("size", plan.SIZES)
@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_setting_is_a_call(model, size):
    found = [job for _, jobs in planned(model, size) for job in jobs]
    for setting in map(json.loads, {job.setting for job in found}):
        call = plan.call_of(setting)
        assert call.keys() <= {"guidance", "repulsion", "method", "steps"} and bool(call) == bool(setting)
        assert setting.get("place", "image") in PLACES


def test_a_scale_takes_the_place_of_a_strength():
    own = Pipeline.load("tiny-sd3").defaults.repulsion
    changed = plan.call_of(plan.but("tiny-sd3", scale=5.0, blocks="all"))["repulsion"]
    assert changed == replace(own, scale=5.0, strength=None, blocks="all")
    assert plan.call_of(plan.but("tiny-sd3"))["repulsion"] == own


@pytest.mark.parametrize("model", plan.REGIMES)
def test_an_ablation_changes_one_thing(model):
    own = asdict(Pipeline.load(model).defaults.repulsion)
    for name in plan.ablations(model).keys() - plan.KNOBS:
        rows = plan.ablations(model)[name].values()
        changed = [{field for field, value in asdict(plan.call_of(row)["repulsion"]).items()
                    if value != own[field]} | ({"place"} & row.keys()) for row in rows]
        assert all(fields <= {"start", "steps"} if name == "steps" else len(fields) <= 1 for fields in changed), name
        assert len({json.dumps(row) for row in rows}) == len(rows) and sum(map(bool, changed)) >= len(rows) - 1


def test_a_place_is_where_the_push_acts_and_nowhere_else_afterwards():
    own = plan.but("tiny-turbo")
    settings = [{}, own, {**own, "place": "image"}, own]
    groups = [[picture.tobytes() for picture in pictures("tiny-turbo", setting, "a circle", seed=0, images=2)]
              for setting in settings]
    assert groups[1] == groups[3] and len({str(group) for group in groups}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# the run


def some_jobs(count=3):
    return [plan.Job("tiny-sd3", "base", '{"steps": 1}', "a circle", seed, images=2) for seed in range(count)]


def paint_some(file, **limit):
    with painter(file, workers=1, **limit) as paint_them:
        return paint_them(some_jobs(), "test")


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    file = tmp_path_factory.mktemp("paper") / "groups.jsonl"
    assert not paint_some(file, minutes=0)  # the time is up after the first
    assert len(finished(file)) == 1 and paint_some(file)
    return file


def test_a_stopped_run_goes_on_and_paints_no_group_twice(painted, tmp_path):
    whole = painted.read_text()
    first, second, third = whole.splitlines(keepends=True)
    marked = first.replace("{", '{"mark": "not painted again", ', 1)
    file = tmp_path / "groups.jsonl"
    file.write_text(marked + third[:40])  # stopped in the middle of a line
    assert paint_some(file)
    assert file.read_text().startswith(marked)
    file.write_text(file.read_text().replace(marked, first))
    assert len(finished(file)) == 3
    assert sorted(map(str, finished(file))) == sorted(map(str, finished(painted)))
    before = file.read_text()
    assert paint_some(file) and file.read_text() == before


def test_groups_of_another_checkpoint_are_refused(painted, tmp_path, capsys, monkeypatch):
    rows = [{**row, "checkpoint": "0" * 12} if row["seed"] == 1 else row for row in finished(painted)]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["paper", "--quick", "--models", "tiny-sd3", "--out", str(tmp_path)])
    before = (tmp_path / "groups.jsonl").read_text()
    assert main() == 2 and (tmp_path / "groups.jsonl").read_text() == before
    assert "was painted with other weights or defaults of tiny-sd3" in capsys.readouterr().err


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
    assert again == row


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.paper", "--quick", "--models", "tiny-sd3",
               "--workers", "1", "--out", str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        file, deadline = tmp_path / "groups.jsonl", time.monotonic() + 600
        while not (file.exists() and file.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=600)
    assert running.returncode == 130 and "Traceback" not in said
    assert f"interrupted: the groups in {file} are kept" in said
    assert file.read_text().endswith("\n") and finished(file)


def test_a_report_of_nothing_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper", "--report", "--models", "tiny-sd3", "--out", str(tmp_path)])
    assert main() == 2
    assert "groups.jsonl holds no group of tiny-sd3: run without --report" in capsys.readouterr().err
