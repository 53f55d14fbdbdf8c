"""With `pytest -n` each process computes in one thread, and so do those that it starts."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
