import sys

import pytest

from sampler import Pipeline, __main__, program


@pytest.fixture(scope="session")
def pipeline():
    return Pipeline.load("tiny-sd3")


@pytest.fixture
def call(pipeline, monkeypatch, tmp_path):
    """Runs the program in this process, with the checkpoint loaded once, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    load = program.Pipeline.load.__func__

    def quick_load(cls, model, **where):
        return pipeline if model is None else load(cls, model, **where)

    monkeypatch.setattr(program.Pipeline, "load", classmethod(quick_load))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sampler", *arguments])
        return __main__.main()

    return run
