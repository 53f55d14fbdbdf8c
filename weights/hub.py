"""Names on the hub, such as black-forest-labs/FLUX.1-dev: found in the local cache, or downloaded."""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

from .bundled import BUNDLED
from .files import PICKLES

# The files of a pipeline's folders that are read; not the original files beside them, nor float16 variants.
READ = ("*.json", "*.txt", "*.model", "*.safetensors")
SKIPPED = ["text_encoders/*", "*.fp16*"]


def resolve(path: str | os.PathLike, component: str | None = None, download: bool = True) -> Path:
    """The file or folder that a path, a bundled checkpoint's name or a repository's name stands for.

    A cache folder `models--org--name` stands for the snapshot that its `refs/main` names. A name `org/name` that is
    not a path is looked up in the cache (`HF_HUB_CACHE`, else `HF_HOME/hub`, else the default folder). If the cache
    has no snapshot, or an incomplete one, and the package huggingface_hub is installed, the files of the pipeline, or
    only those of the folder `component`, are downloaded. With `download` False a cached snapshot is returned even if it
    is incomplete. Raises FileNotFoundError if nothing is found.
    """
    text, path = str(path), Path(path)
    if text in BUNDLED:
        return BUNDLED[text]
    if path.is_dir() and path.name.startswith("models--"):
        if snapshot := _snapshot(path):
            return snapshot
        raise FileNotFoundError(f"{path} has no snapshot that refs/main names: download it again, or give the "
                                "snapshot's folder")
    if path.exists():
        return path
    is_file = path.suffix in (".safetensors", ".gguf", ".json", *PICKLES)
    if is_file or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise FileNotFoundError(f"{text} does not exist: give a .safetensors file, a folder with one, one of "
                                f"{', '.join(BUNDLED)}, or a name on the hub such as black-forest-labs/FLUX.1-dev")
    snapshot = _snapshot(cache_folder() / f"models--{text.replace('/', '--')}")
    if snapshot and (not download or _is_complete(snapshot, component)):
        return snapshot
    if not download or not find_spec("huggingface_hub"):
        install = "" if find_spec("huggingface_hub") else "pip install huggingface_hub && "
        only = f' --include "{component}/*"' if component else ""
        state = "only in part in" if snapshot else "neither a path nor in"
        raise FileNotFoundError(f"{text} is {state} the cache {cache_folder()}: "
                                f"run `{install}hf download {text}{only}`")
    return _download(text, component)


def cache_folder() -> Path:
    """The folder of the hub's downloads, from the same environment variables as in huggingface_hub."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _snapshot(cached: Path) -> Path | None:
    """The snapshot that `refs/main` names, or the only one there is."""
    ref, snapshots = cached / "refs" / "main", cached / "snapshots"
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    if ref.is_file() and snapshots / ref.read_text().strip() in found:
        return snapshots / ref.read_text().strip()
    return found[0] if len(found) == 1 else None


def _is_complete(snapshot: Path, component: str | None) -> bool:
    """Whether `component`, or each folder in model_index.json, is complete: a download may have been interrupted."""
    if component and not (snapshot / component).is_dir():
        return any(snapshot.glob("*.safetensors"))  # a repository of original files
    index = snapshot / "model_index.json"
    names = re.findall(r'"(\w+)":\s*\[\s*"', index.read_text(encoding="utf-8")) if index.is_file() else []
    names = [component] if component else names  # entries with [null, null] are not matched
    return bool(names) and all(_has_files(snapshot / name) for name in names)


def _has_files(folder: Path) -> bool:
    """Whether a folder has files and, if it is a network's, its weights with all shards that an index lists."""
    here = {file.name: file for file in folder.glob("*") if file.exists()}
    indices = [file for name, file in here.items() if name.endswith(".safetensors.index.json")]
    shards = {shard for file in indices for shard in re.findall(r'"([^"]+\.safetensors)"', file.read_text())}
    is_network = folder.name.startswith(("transformer", "vae", "text_encoder"))
    return shards <= here.keys() and any(name.endswith(".safetensors") or not is_network for name in here)


def _download(name: str, component: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *(f"{component or '*'}/{ending}" for ending in READ)]
    try:
        snapshot = Path(snapshot_download(name, cache_dir=cache_folder(), allow_patterns=patterns,
                                          ignore_patterns=SKIPPED))
    except Exception as error:  # raised by several packages, without a common class
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise FileNotFoundError(f"{name} is not in the cache {cache_folder()} and could not be downloaded ({reason}): "
                                "check name and network, accept the license on the model's page if it has one, and "
                                "run `hf auth login`") from error
    if not _is_complete(snapshot, component):
        raise FileNotFoundError(f"{name} has no {component or 'model_index.json'} with all its files, so it "
                                f"is not in the hub's folder layout: run `hf download {name} FILE` for one of its "
                                "files, then give its path")
    return snapshot
