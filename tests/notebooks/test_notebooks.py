"""The guided tour runs top to bottom, and what is committed is what a run leaves behind.

`SAVE_NOTEBOOKS=1 pytest tests/notebooks` runs all and writes the new outputs into them, with compressed pictures.
Without it, what `QUICK` says replaces the values of cells with the tag "parameters": the stored outputs stand for the
long run.
"""

import base64
import io
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}  # nothing of the machine that ran it
QUICK = "STEPS, BATCH, SCENES, SHOWN = 4, 4, 32, 8"
every_notebook = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def code_cells(file, tag=None):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", ())]


def compressed(png):
    """A picture in 256 colors, base64 → base64."""
    image, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    image.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), png, key=len)


def test_there_are_notebooks():
    assert len(FILES) >= 8


@every_notebook
def test_it_runs_top_to_bottom(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # also where the packages are not installed
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that spin take twice as long on cores that others use
    notebook, save = nbformat.read(file, as_version=4), os.environ.get("SAVE_NOTEBOOKS")
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()) and not save:
            cell.source += f"\n{QUICK}"
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(file.parent)}})
    client.execute()  # an error in a cell is raised here
    if save:
        notebook.metadata = METADATA
        for output in [output for cell in notebook.cells for output in cell.get("outputs", ())]:
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = compressed(output.data["image/png"])
        nbformat.write(notebook, file)


@every_notebook
def test_the_committed_outputs_are_those_of_one_whole_run(file):
    cells = code_cells(file)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= (0 if file.stem == "lab" else 5)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@every_notebook
def test_nothing_of_the_machine_is_in_it(file):
    notebook = nbformat.read(file, as_version=4)
    assert notebook.metadata == METADATA
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    text = file.read_text(encoding="utf-8")
    assert not [place for place in (str(ROOT), str(Path.home()), "/tmp/", "site-packages") if place in text]
    assert len(text) < 1e6


@pytest.mark.parametrize("file", [*FILES, ROOT / "docs" / "lecture.md"], ids=lambda file: file.stem)
def test_what_it_links_to_exists(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = nbformat.read(file, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", text) + re.findall(r'src="(?!https?:)([^"]+)"', text)
    assert not [link for link in links if not (file.parent / link).exists()]


def test_every_slide_has_its_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    import slides

    slides.main(tmp_path)
    text = (tmp_path / "slides.md").read_text(encoding="utf-8")
    assert text.count("\n# ") == len(slides.rows()) >= 15
    for picture in re.findall(r"\]\((\d+\.png)\)", text):
        Image.open(tmp_path / picture).verify()
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == len(slides.rows())  # none is shown twice
