"""The guided tour runs top to bottom, and what is committed is what a run leaves behind.

`SAVE_NOTEBOOKS=1 pytest tests/notebooks` runs all and writes the new outputs into them.
"""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}  # nothing of the machine that ran it
every_notebook = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def code_cells(file, tag=None):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", ())]


def test_there_are_notebooks():
    assert len(FILES) >= 3


@every_notebook
def test_it_runs_top_to_bottom(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # also where the packages are not installed
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(file.parent)}})
    client.execute()  # an error in a cell is raised here
    if os.environ.get("SAVE_NOTEBOOKS"):
        notebook.metadata = METADATA
        nbformat.write(notebook, file)


@every_notebook
def test_the_committed_outputs_are_those_of_one_whole_run(file):
    cells = code_cells(file)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 5
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@every_notebook
def test_nothing_of_the_machine_is_in_it(file):
    notebook = nbformat.read(file, as_version=4)
    assert notebook.metadata == METADATA
    assert all(set(cell.metadata) <= {"tags", "jupyter"} for cell in notebook.cells)
    text = file.read_text(encoding="utf-8")
    assert not [place for place in (str(ROOT), str(Path.home()), "/tmp/", "site-packages") if place in text]
    assert len(text) < 1.5e6


@every_notebook
def test_each_exercise_has_a_hidden_solution_that_ends_in_a_check(file):
    tags = [tag for cell in code_cells(file) for tag in cell.metadata.get("tags", ())]
    assert len(tags) >= 4 and tags == ["exercise", "solution"] * (len(tags) // 2)
    assert all("your line" in cell.source for cell in code_cells(file, "exercise"))
    for cell in code_cells(file, "solution"):
        assert cell.metadata.jupyter.source_hidden is True
        last = ast.parse(cell.source).body[-1]
        assert any(isinstance(node, ast.Assert) for node in ast.walk(last))
