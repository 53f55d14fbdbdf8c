"""The committed results of the experiments: nothing that was not planned, and rows of each regime again.

Every row names the checkpoint that painted it by a checksum. Where a bundled checkpoint has changed since, its rows can
no longer be made again: then the page has to say so, which is checked first, and the rest is left out until the
experiments have run again.
"""

import json
from pathlib import Path

import pytest

from benchmarks.paper import measures, plan, tables
from benchmarks.paper.results import Results
from benchmarks.paper.run import finished, paint, stale

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "paper"
PAGE = (FOLDER.parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
ROWS = finished(FOLDER / "groups.jsonl")
OLD = stale(ROWS)
current = pytest.mark.skipif(bool(OLD), reason=f"measured with earlier weights of {', '.join(OLD)}, as the page says")


def test_the_page_says_where_results_are_of_earlier_weights():
    assert ROWS and (f"earlier weights of {', '.join(OLD)}" in PAGE if OLD else "earlier weights" not in PAGE)


@current
@pytest.mark.parametrize("model", plan.REGIMES)
def test_every_group_was_planned_and_is_there_once(model):
    stages = plan.stages([model], plan.SIZES["full"], Results(ROWS).finalists)  # whose choice is computed again
    planned = {job.key for _, jobs in stages for job in jobs}
    painted = [plan.Job.of(row).key for row in ROWS if row["model"] == model]
    assert painted and len(painted) == len(set(painted)) and planned.issuperset(painted)


@current
@pytest.mark.parametrize("which", ["base", "repelled", "painted last"])
@pytest.mark.parametrize("model", plan.REGIMES)
def test_a_committed_row_comes_out_again(model, which):
    setting = {} if which == "base" else plan.but(model)
    wanted = setting, "a ring at the bottom", 0
    *_, row = (row for row in ROWS if row["model"] == model and row["images"] == plan.GROUP and (
        which == "painted last" or (row["setting"], row["prompt"], row["seed"]) == wanted))
    again = paint(plan.Job.of(row))
    for name in ("checkpoint", "scenes", "adherence", "unreadable", "vendi"):  # what the reader reads, all of it
        assert again[name] == row[name], name
    # Another machine adds in another order: a pixel may round to the other side, and one at the edge counts or not.
    assert again["wrong_pixels"] == pytest.approx(row["wrong_pixels"], abs=5)
    found, before = measures.vectors_of(again), measures.vectors_of(row)
    assert (found - before).norm() <= 0.02 * before.norm()


@current
def test_the_tables_are_those_of_the_rows():
    costs = FOLDER / "costs.json"
    made = tables.report(ROWS, json.loads(costs.read_text()) if costs.exists() else [])
    assert made == (FOLDER / "tables.md").read_text(encoding="utf-8")


def test_the_readme_quotes_what_the_bundled_weights_do():
    rows = finished(FOLDER.parent / "next" / "groups.jsonl") if OLD else ROWS
    assert rows and not stale(rows)
    readme = (FOLDER.parents[2] / "README.md").read_text(encoding="utf-8")
    shipped = [line.split(" | ") for line in tables.report(rows, []).splitlines() if ", repelled | " in line]
    assert len(shipped) >= len(plan.REGIMES)
    for _, _, gain, _, _, points, _, change, *_ in shipped[: len(plan.REGIMES)]:
        assert f"| {gain} | {points} | {change} |".replace("-", "−") in readme, (gain, points, change)


def test_the_page_quotes_the_tables():
    made = (FOLDER / "tables.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    assert quoted and not [line for line in quoted if line not in made]
    (painted,) = (line for line in made if line.startswith("Painted so far: "))
    assert painted in PAGE  # a part of the plan does not pass for the whole
