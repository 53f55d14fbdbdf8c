"""The small pipelines of tests/sampler are imported by the tests of the examples too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "sampler"))
