"""What README and docs/code.md promise that can be checked: the equation map, the commands, the links."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def equation_map():
    section = CODE.split("## From the paper to the code")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines()
            if line.startswith("| ") and "---" not in line][1:]
    return [(row[0], *(re.findall(r"`([^`]+)`", cell) for cell in row[1:])) for row in rows]


def resolve(symbol):
    """The module, class or function of a dotted name."""
    parts = symbol.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for name in parts[i:]:
            found = getattr(found, name)
        return found


def test_the_map_holds_every_equation_of_the_method():
    what = " ".join(row[0] for row in equation_map())
    for equation in ("Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "τ", "CFG"):
        assert equation in what


@pytest.mark.parametrize("row", equation_map(), ids=lambda row: row[0])
def test_each_row_points_at_a_line_and_a_test_that_are_there(row):
    what, (symbol,), (line,), tests = row
    found = resolve(symbol)
    assert line in inspect.getsource(found), f"{what}: {symbol} has no line {line!r}"
    assert tests, f"{what} has no test"
    for test in tests:
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{what}: no test {test}"


def test_the_six_calls_from_the_prompt_to_the_push_are_lines_of_their_functions():
    section = CODE.split("## From the prompt to the push")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", section, flags=re.M)
    assert len(rows) == 6  # that these functions follow each other is for tests/test_path.py to show
    for symbol, line in rows:
        assert line in inspect.getsource(resolve(symbol)), f"{symbol} has no line {line!r}"


def test_the_two_commands_are_those_that_ci_runs():
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ('pip install -c constraints.txt -e . && python -m sampler "a star" --seed 1',
                    'pip install -c constraints.txt -e ".[test]" && pytest -n 2'):
        assert command in README and command in gate


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_shows_or_links_to_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    links += re.findall(r'(?:src|href)="(?!https?:)([^"]+)"', text)
    for link in links:
        assert (page.parent / link).exists(), link
