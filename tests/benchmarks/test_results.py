"""The committed results of the experiments: all that was planned, nothing else, and a row of each regime again."""

import json
from pathlib import Path

import pytest

from benchmarks.paper import measures, plan, tables
from benchmarks.paper.run import finished, paint

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "paper"
ROWS = finished(FOLDER / "groups.jsonl")
# planned since these results were made: the next run of the experiments paints them, and this line goes
NOT_YET = {*plan.STRENGTHS, "Feature Self-Guidance", "first step from the teacher"}


def job_of(row):
    fields = {name: row[name] for name in plan.Job.__dataclass_fields__}
    return plan.Job(**{**fields, "setting": json.dumps(row["setting"])})


@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_group_that_was_planned_is_there_once(model):
    rows = [row for row in ROWS if row["model"] == model]
    planned = {job.key for job in plan.jobs([model], plan.SIZES["small"]) if job.method not in NOT_YET}
    painted = [job_of(row).key for row in rows]
    assert len(painted) == len(set(painted)) and {*painted} == planned


@pytest.mark.parametrize("setting", [{}, {"repulsion": {}}], ids=["base", "repelled"])
@pytest.mark.parametrize("model", plan.REGIMES)
def test_a_committed_row_comes_out_again(model, setting):
    (row,) = (row for row in ROWS if (row["model"], row["setting"], row["prompt"], row["seed"], row["images"])
              == (model, setting, "a ring at the bottom", 0, plan.GROUP))
    again = paint(job_of(row))
    for name in ("scenes", "adherence", "unreadable"):  # read off the pictures: whole numbers behind all of them
        assert again[name] == row[name], name
    assert again["vendi"] == pytest.approx(row["vendi"], rel=1e-9)
    # Another machine adds in another order: a pixel may round to the other side, and one at the edge counts or not.
    assert again["wrong_pixels"] == pytest.approx(row["wrong_pixels"], abs=2)
    found, wanted = measures.vectors_of(again), measures.vectors_of(row)
    assert (found - wanted).norm() <= 0.02 * wanted.norm()


def test_the_tables_are_those_of_the_rows():
    costs = json.loads((FOLDER / "costs.json").read_text())
    assert tables.report(ROWS, costs) == (FOLDER / "tables.md").read_text(encoding="utf-8")


def test_the_page_quotes_the_tables():
    page = (FOLDER.parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    quoted = [line for line in page.splitlines() if line.startswith("|") and "---" not in line]
    made = (FOLDER / "tables.md").read_text(encoding="utf-8").splitlines()
    assert quoted and not [line for line in quoted if line not in made]
