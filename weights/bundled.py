"""The small checkpoints bundled with this repository, in the hub's folder layout."""

from pathlib import Path

BUNDLED = {name: Path(__file__).parent / "checkpoints" / name for name in ("tiny-sd3", "tiny-flux", "tiny-turbo")}
