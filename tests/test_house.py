"""The rules of the house: which package may import which, and what a reader may count on in every file."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # package: which others it may import
    "repulsion": set(),
    "mmdit": {"repulsion"},
    "weights": {"repulsion", "mmdit"},
    "tiny": set(),
    "sampler": {"repulsion", "mmdit", "weights", "tiny"},
    "training": {"repulsion", "mmdit", "weights", "tiny", "sampler"},
    "porting": {"repulsion", "mmdit", "weights", "sampler"},
}
PACKAGES = list(ALLOWED)
OUTSIDE = {"tests", "benchmarks", "notebooks", "examples"}
ORACLES = {"diffusers", "transformers"}  # what tests compare with
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def name_of(file):
    return file.relative_to(ROOT).as_posix()


every_file = pytest.mark.parametrize("file", FILES, ids=name_of)
every_package = pytest.mark.parametrize("package", [name for name in PACKAGES if name != "training"])  # scripts


def imported(source, module):
    """The full names of the modules that a source imports anywhere; `module` is its own, as parts."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(module[: len(module) - node.level]) if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            names += [f"{base}.{alias.name}".lstrip(".") for alias in node.names] if node.level else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names.append(ast.literal_eval(node.args[0]))
    return names


def tops(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return {name.split(".")[0] for name in imported(file.read_text(encoding="utf-8"), parts)}


def test_the_reader_of_imports_reads_every_form():
    source = "import a.b\nfrom c.d import e\nfrom . import f\nfrom ..g import h\ndef late():\n    import numpy as np\n"
    found = imported(source, ("sampler", "methods", "cads"))
    assert found == ["a.b", "c.d", "sampler.methods.f", "sampler.g.h", "numpy"]
    assert imported("from ...weights import x", ("sampler", "methods", "cads")) == ["weights.x"]


@every_file
def test_imports_point_one_way(file):
    package = file.relative_to(ROOT).parts[0]
    assert tops(file) & (set(PACKAGES) | OUTSIDE | ORACLES) <= ALLOWED[package] | {package}


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "repulsion"], ids=name_of)
def test_repulsion_is_pure_tensor_maths(file):
    assert tops(file) <= {"repulsion", "torch", "numpy", "einops"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "tiny"], ids=name_of)
def test_tiny_imports_torch_alone(file):
    assert tops(file) <= {"tiny", "torch"} | sys.stdlib_module_names


def test_importing_the_program_leaves_the_oracles_out():
    program = "import repulsion, mmdit, weights, tiny, sampler, sampler.__main__, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers"} & set(done.stdout.split())


@every_file
def test_no_file_is_longer_than_a_reader_wants(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def public_definitions(package):
    """Functions and classes that a package's `__all__` names, as they stand in its files."""
    wanted = set(importlib.import_module(package).__all__)
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
                yield node


@every_package
def test_public_names_exist_and_are_documented(package):
    module = importlib.import_module(package)
    assert module.__doc__
    assert sorted(module.__all__) == sorted(set(module.__all__))
    callables = {name for name in module.__all__ if callable(getattr(module, name))}
    documented = {node.name for node in public_definitions(package) if ast.get_docstring(node)}
    assert callables <= documented, f"without a docstring: {callables - documented}"


@every_package
def test_public_methods_are_documented(package):
    bare = [
        f"{definition.name}.{node.name}"
        for definition in public_definitions(package) if isinstance(definition, ast.ClassDef)
        for node in definition.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare, f"without a docstring: {', '.join(bare)}"
