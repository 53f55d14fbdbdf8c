"""Names on the hub, such as black-forest-labs/FLUX.1-dev: found in the local cache, or downloaded."""

import os
import re
from pathlib import Path

from .embedded import EMBEDDED

# What a pipeline reads of a repository: the folders, not the original files beside them.
PIPELINE = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
SKIPPED = ["text_encoders/*", "*.fp16.*"]


def resolve(path: str | os.PathLike, component: str | None = None) -> Path:
    """The file or folder that a path, an embedded checkpoint's name or a repository's name stands for.

    A cache folder `models--org--name` stands for the snapshot that its `refs/main` names. A name `org/name` that is
    no path is looked up in the cache (`HF_HUB_CACHE`, else `HF_HOME/hub`, else the default place), then downloaded
    if the package huggingface_hub is installed (of it only the folder `component`, where given). Raises
    FileNotFoundError where there is nothing.
    """
    text, path = str(path), Path(path)
    if text in EMBEDDED:
        return EMBEDDED[text]
    if path.exists():
        return _snapshot(path) if path.name.startswith("models--") and path.is_dir() else path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise FileNotFoundError(f"{text} does not exist: give a .safetensors file, a folder with one, one of "
                                f"{', '.join(EMBEDDED)}, or a name on the hub such as black-forest-labs/FLUX.1-dev")
    cached = cache_folder() / f"models--{text.replace('/', '--')}"
    if cached.is_dir():
        snapshot = _snapshot(cached)
        if (snapshot / (component or "model_index.json")).exists():
            return snapshot
    return _download(text, component)


def cache_folder() -> Path:
    """Where the hub's downloads are kept, by the same variables as in huggingface_hub."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(home) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _snapshot(cached: Path) -> Path:
    """The snapshot that `refs/main` names, or the only one there is."""
    ref, snapshots = cached / "refs" / "main", cached / "snapshots"
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    if ref.is_file() and snapshots / ref.read_text().strip() in found:
        return snapshots / ref.read_text().strip()
    if len(found) == 1:
        return found[0]
    raise FileNotFoundError(f"{cached} holds {len(found)} snapshots and refs/main names none of them: "
                            "download it again, or give the snapshot's folder")


def _download(name: str, component: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        what = f' --include "{component}/*"' if component else ""
        raise FileNotFoundError(f"{name} is neither a path nor in the cache {cache_folder()}: run "
                                f"`pip install huggingface_hub && hf download {name}{what}`") from None
    patterns = [f"{component}/*"] if component else PIPELINE
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=SKIPPED))
    except (OSError, ValueError) as error:  # no network, no such name, a license to accept first
        raise FileNotFoundError(f"{name} is not in the cache {cache_folder()} and could not be downloaded: "
                                f"{str(error).splitlines()[0]}") from error
