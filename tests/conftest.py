"""With `pytest -n`, a process has one core: its own, and that of the processes that it starts."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
