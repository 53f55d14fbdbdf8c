"""Every exercise and every blank of the lab: its solution passes, typical wrong answers and no answer do not."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))  # for show, checks and lab_checks, as in a notebook


def cells(stem, kind="code"):
    notebook = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def exercises(stem):
    return [cell.source for cell in cells(stem) if "exercise" in cell.metadata.get("tags", ())]


def functions(source):
    """Name → source of each function that a source defines at its top level."""
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)}


def solutions(stem):
    """Name → source: the lab's from their file, a notebook's from its last cell."""
    if stem == "lab":
        return functions((NOTEBOOKS / "solutions" / "lab.py").read_text(encoding="utf-8"))
    blocks = re.findall(r"<details><summary>.*?```python\n(.*?)```\n</details>", cells(stem, "markdown")[-1].source,
                        flags=re.S)
    return {name: source for block in blocks for name, source in functions(block).items()}


def asked(exercise):
    """The name of the function that an exercise asks for."""
    return re.search(r"checks\.(\w+)\(\1\)", exercise)[1]


def names_of(stem):
    """What a notebook imports and defines, without what its cells compute."""
    names = {}
    for cell in cells(stem):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
                exec(ast.unparse(node), names)
    return names


STEMS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if exercises(path.stem))
ALL = [(stem, asked(exercise)) for stem in STEMS for exercise in exercises(stem)]


def said(stem, name, source, capsys):
    """What the check of an answer prints."""
    names = names_of(stem)
    exec(source, names)
    checks = names["lab_checks" if stem == "lab" else "checks"]
    capsys.readouterr()
    passes = getattr(checks, name)(names[name])
    text = capsys.readouterr().out
    assert passes is (text == "passes\n")
    return text


WRONG = [  # notebook, exercise, an edit of its solution, and words of what is said
    ("1", "ends_of_line", "return x - sigma * v, x + (1 - sigma) * v", "return x + (1 - sigma) * v, x - sigma * v",
     "the picture comes first"),
    ("1", "ends_of_line", "x - sigma * v", "x + sigma * v", "the picture is wrong"),
    ("1", "ends_of_line", "x + (1 - sigma) * v", "x + sigma * v", "the noise is wrong"),
    ("1", "same_ratio", "r * sigma", "sigma / r", "averaging hides less"),
    ("1", "same_ratio", "r * sigma", "r**2 * sigma", "r times"),
    ("1", "velocity_of_one", "x - x0", "x0 - x", "the sign is wrong"),
    ("1", "velocity_of_one", "(x - x0) / sigma", "x - x0", "right at σ = 1 only"),
    ("2", "shuffled", "image_out[:, order]", "image_out", "in its new place"),
    ("2", "shuffled", "return context_out", "return context_out.flip(1)", "does not depend on their order"),
    ("2", "rope_score", ".real", "", "take the real part"),
    ("2", "rope_score", "q.conj()", "q", "conjugated"),
    ("2", "rope_score", "angles_t - angles_s", "angles_t + angles_s", "same position"),
    ("2", "masked_attention", "attn_mask=allowed", "attn_mask=None", "depends on the image"),
    ("2", "masked_attention", "[:, :, :n]", "", "context's rows alone"),
    ("3", "vendi_of_typical", "B ** (1 - p) / p**p", "1 / p**p", "for B = 8"),
    ("3", "score", "return -", "return ", "the sign is wrong"),
    ("3", "score", " / sigma", "", "divide by σ"),
    ("3", "score", "(1 - sigma) * v", "v", "n = x + (1 − σ) v"),
    ("3", "weight_for", "1 + math", "math", "needs w = 1"),
    ("3", "weight_for", "wanted / (1 - wanted), q / (1 - q)", "wanted, q", "the odds"),
    ("4", "entropy_of_equals", "(B - 1) * torch.special.entr(others)", "torch.special.entr(others)", "H is log B"),
    ("4", "entropy_of_equals", "(1 - c) / B", "1 / B", "wrong for B = 8"),
    ("4", "vendi_of_clusters", ".exp()", "", "four different pictures"),
    ("4", "vendi_of_clusters", "torch.special.entr(p).sum().exp()", "len(p)", "clusters of 4, 2 and 1"),
    ("4", "length_halfway", "** 0.5", "** 1", "at a right angle"),
    ("4", "length_halfway", "((1 + c) / 2)", "(1 - c / 2 + c**2 / 2 - (1 - c) / 2)", "for c = 0.5"),
    ("5", "slope_of_equals", "return (B - 1)", "return -(B - 1)", "the sign is wrong"),
    ("5", "slope_of_equals", "(B - 1) / B * math", "math", "for B = 8"),
    ("5", "same_effect", "a**2 * eta", "a * eta", "another length"),
    ("5", "same_effect", "a**2 * eta", "eta / a", "another length"),
    ("5", "step_of_renyi", "W = -2", "W = 2", "the sign is wrong"),
    ("5", "step_of_renyi", "W = -2", "W = -1", "the length 0.5 times"),
    ("5", "step_of_renyi", "* density /", "* density.square() /", "W is"),
    ("5", "factor_of_sum", "1 + 2", "1 - 2", "becomes shorter"),
    ("5", "factor_of_sum", " * (1 - k)", "", "the two gradients"),
    ("lab", "mix", "noise - x0", "x0 - noise", "not back"),
    ("lab", "mix", "[:, None, None, None]", "", "raises RuntimeError"),
    ("lab", "mix", "(1 - level) * x0 + level * noise", "level * x0 + (1 - level) * noise", "the picture at σ = 0"),
    ("lab", "guided", "u + w * (c - u)", "c + w * (c - u)", "w = 1 has to give c"),
    ("lab", "euler", "(after - sigma)", "sigma", "minus 1"),
    ("lab", "euler", "velocity(x, sigma)", "velocity(noise, sigma)", "at the present x"),
    ("lab", "entropy_gradient", " - (W * K).sum(dim=1, keepdim=True) * u", "", "must be orthogonal"),
    ("lab", "entropy_gradient", " * (1 - identity)\n    return 2 * r * (W @ u - (W * K).sum(dim=1, keepdim=True) * u)",
     "\n    return 2 * r * (W @ u)", "a group of one must be zero"),
    ("lab", "entropy_gradient", "W = -U", "W = U", "the entropy falls"),
    ("lab", "entropy_gradient", "return 2 *", "return", "the length 0.5 times"),
    ("lab", "entropy_gradient", "eigenvalues.log()", "eigenvalues", "differs from automatic"),
    ("lab", "entropy_gradient", "2 * r * (", "2 * (", "differs from automatic"),
    ("lab", "attention", "context = push(context)", "push(context)", "has to be what the attention returns"),
    ("lab", "attention", "module.context.out(joint[:, :n])", "joint[:, :n]", "has to be that of the module"),
    ("lab", "attention", "context = push(context)", "context, image = push(context), push(image)", "only the context"),
    ("lab", "attention", "if push:", "if False:", "never called"),
    ("lab", "attention", "(joint[:, :n])\n    if push:\n        context = push(context)",
     "(push(joint[:, :n]) if push else joint[:, :n])", "other tokens"),
    ("lab", "choose_strength", "0.95 * measured[0][1]", "0.95", "not 95 of 100"),
    ("lab", "choose_strength", "measured[s][0])", "s)", "need not be the longest"),
    ("lab", "repel_in", "return image, push(context)", "return push(image), context", "the image is pushed"),
    ("lab", "repel_in", "return image, push(context)", "return push(context)", "two things"),
    ("lab", "repel_in", "return attention.register", "attention.register", "missing return"),
]


def full(stem):
    return next((one for one in STEMS if one.split("-")[0] == stem), None)


def test_the_exercises_are_found_and_all_have_typical_wrong_answers():
    assert len(ALL) >= 20
    assert set(ALL) == {(full(stem), name) for stem, name, *_ in WRONG}


@pytest.mark.parametrize(("stem", "name"), ALL)
def test_a_solution_passes_and_none_does_not(stem, name, capsys):
    source = solutions(stem)[name]
    assert said(stem, name, source, capsys) == "passes\n"
    assert said(stem, name, f"def {name}(*_): pass", capsys).startswith("not yet: your function returns None")
    assert said(stem, name, f"{name} = None", capsys) == "not yet: replace None by your function\n"


@pytest.mark.parametrize(("stem", "name", "old", "new", "words"), WRONG)
def test_a_typical_wrong_answer_is_told_what_is_wrong(stem, name, old, new, words, capsys):
    source = solutions(full(stem))[name]
    assert source.count(old) == 1
    text = said(full(stem), name, source.replace(old, new), capsys)
    assert text.startswith("not yet: ") and words in text


@pytest.mark.parametrize("stem", STEMS)
def test_no_exercise_overwrites_what_other_cells_use(stem):
    kept = [cell.source for cell in cells(stem) if "exercise" not in cell.metadata.get("tags", ())]
    used = {node.id for source in kept for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    if stem != "lab":  # which paints with what the reader has written
        assert not used & {asked(exercise) for exercise in exercises(stem)}


def filled(cell, answers):
    """Replaces the function of an exercise in the lab by its solution."""
    for name, source in functions(cell.source).items():
        if "exercise" in cell.metadata.get("tags", ()):
            cell.source = cell.source.replace(source, answers[name])


def test_the_lab_paints_with_the_solutions_what_the_pipeline_paints(monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as in test_notebooks.py
    notebook, answers = nbformat.read(NOTEBOOKS / "lab.ipynb", as_version=4), solutions("lab")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            filled(cell, answers)
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert text.count("passes") == len(exercises("lab")) and "not yet" not in text
    assert int(re.search(r"largest difference: (\d+) of 255", text)[1]) <= 1
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 5
