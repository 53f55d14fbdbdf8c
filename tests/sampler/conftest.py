import pytest

from sampler import Pipeline


@pytest.fixture(scope="session")
def pipeline():
    return Pipeline.load("tiny-sd3")
