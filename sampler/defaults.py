"""The defaults of a checkpoint: steps, guidance, size, schedule, repulsion."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from mmdit import MMDiTConfig
from repulsion import Repulsion
from weights.variants import told_by_name


@dataclass(frozen=True)
class Defaults:
    """The settings of a checkpoint that a call does not give. Sizes in pixels."""

    steps: int
    guidance: float | None = None  # classifier-free (SD3) or of the guidance embedding (FLUX.1); None: neither
    height: int = 1024
    width: int = 1024
    shift: float | None = None  # of the schedule, without a scheduler_config.json; None: by picture size
    prompt_tokens: int | None = None  # of T5; None: as many as the family reads
    repulsion: Repulsion | None = None
    world: str | None = None  # "tiny": pictures that `tiny.reader` can read


_FLUX = Repulsion(scale=5e8, iterations=50, steps=1)  # the paper's settings, η where it reports its figures
_LARGE = Repulsion(scale=5e5, iterations=100, steps=4)

PUBLIC = {  # by public name
    "flux1-dev": Defaults(28, 3.5, repulsion=_FLUX),
    "flux1-kontext-dev": Defaults(28, 2.5, repulsion=_FLUX),
    "flux1-schnell": Defaults(4, shift=1.0, prompt_tokens=256),
    "sd3-medium": Defaults(28, 7.0, shift=3.0),
    "sd3.5-medium": Defaults(40, 4.5, shift=3.0),
    "sd3.5-large": Defaults(28, 4.5, shift=3.0, repulsion=_LARGE),
    "sd3.5-large-turbo": Defaults(4, shift=3.0, repulsion=replace(_LARGE, steps=1)),
}


def find_defaults(path: Path, config: MMDiTConfig) -> Defaults:
    """From a folder's `sampling.json` (bundled checkpoints), else those of the public checkpoint that it is.

    `path` is the checkpoint's folder or file, `config` its transformer's. Raises ValueError for an unreadable file.
    """
    if (path / "sampling.json").is_file():
        found = read_json(path / "sampling.json")
        try:
            found["repulsion"] = Repulsion(**found["repulsion"]) if found.get("repulsion") else None
            return Defaults(**found)
        except TypeError as error:
            raise ValueError(f"{path / 'sampling.json'}: {error} (strength took the place of diversity)") from error
    return PUBLIC[public_name(path, config)]


def public_name(path: Path, config: MMDiTConfig) -> str:
    """The public checkpoint that has this transformer, or one built like it, of whatever size.

    Kontext and dev have the same tensors, so have large and turbo: these are distinguished by their names.
    """
    if config.position == "rope":
        dev = told_by_name(("flux1-dev", "flux1-kontext-dev"), path) or "flux1-dev"
        return dev if config.guidance_embedding else "flux1-schnell"
    if not config.qk_norm or config.dual_attention_blocks:
        return "sd3.5-medium" if config.dual_attention_blocks else "sd3-medium"
    return told_by_name(("sd3.5-large", "sd3.5-large-turbo"), path) or "sd3.5-large"


def read_json(file: Path) -> dict:
    """A JSON file's contents. Raises FileNotFoundError or ValueError naming the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: download the checkpoint's folder again")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
