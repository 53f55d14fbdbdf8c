"""The files of each part of a pipeline: in one folder or file, beside it, or given by the caller."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import weights
from weights import Stored

PathLike = str | Path

FOLDERS = {"flux": {"clip_l": "", "t5": "_2"}, "sd3": {"clip_l": "", "clip_g": "_2", "t5": "_3"}}  # text_encoder…
BESIDE = ("*.safetensors", "text_encoders/*.safetensors", "vae/*.safetensors")
PUBLIC_FILES = {
    "autoencoder": "vae/, or ae.safetensors of FLUX.1", "clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors",
    "t5": "t5xxl_fp16.safetensors",
}


@dataclass(frozen=True)
class Sources:
    """The parts of a pipeline, recognized and checked; none of their numbers is read."""

    path: Path  # what the pipeline is called after
    family: str  # "flux" or "sd3"
    transformer: Stored
    autoencoder: Stored
    text_encoders: dict[str, Stored]  # by role: clip_l, clip_g, t5
    tokenizers: dict[str, Path]  # likewise
    scheduler: Path | None  # scheduler_config.json, where there is one


def find_sources(path: PathLike | None = None, transformer: PathLike | None = None,
                 autoencoder: PathLike | None = None, text_encoders: Sequence[PathLike] | None = None,
                 tokenizers: PathLike | Sequence[PathLike] | None = None) -> Sources:
    """Every part from the path given for it, else from the folder or file `path`, else from beside it.

    `path`: a hub folder, a folder of original files, an original or merged file, or a name (`weights.hub.resolve`).
    Beside a file are looked at: its own folder in either layout, and `text_encoders/`, `vae/` in it. `tokenizers`: the
    folder that holds `tokenizer/`, `tokenizer_2/`, …, or one path for each text encoder, in the order CLIP-L, CLIP-G,
    T5. SD3's T5 may be left out. Raises FileNotFoundError naming the parts that are missing and their public files,
    `weights.CheckpointError` for wrong or damaged files.
    """
    place = None if path is None else weights.resolve(path)
    main = weights.open_transformer(place if transformer is None else transformer)
    home = place if place and place.is_dir() else (place or main.path).parent
    family = "flux" if main.config.position == "rope" else "sd3"
    around = {main.path} if main.path.is_file() else set()
    around |= {file for pattern in BESIDE for file in home.glob(pattern)}

    vae = home / "vae" if (home / "vae" / "config.json").is_file() else None
    vae = autoencoder or vae or _first(around, "autoencoder")
    if text_encoders is not None:
        encoders = _given_encoders(text_encoders, family)
    else:
        folders = {role: home / f"text_encoder{number}" for role, number in FOLDERS[family].items()}
        places = {role: folder if folder.is_dir() else _first(around, role) for role, folder in folders.items()}
        encoders = {role: weights.open_text_encoder(found, which=None if found.is_dir() else role)
                    for role, found in places.items() if found}
    spell = _tokenizers(tokenizers, home, family, encoders)
    missing = [f"the autoencoder ({PUBLIC_FILES['autoencoder']})"] if vae is None else []
    for role, number in FOLDERS[family].items():
        if role not in encoders and (family, role) != ("sd3", "t5"):
            missing.append(f"{role} (text_encoder{number}/ or {PUBLIC_FILES[role]})")
        elif role in encoders and role not in spell:
            missing.append(f"the tokenizer of {role} (tokenizer{number}/)")
    if missing:
        raise FileNotFoundError(f"{path or main.path} is no whole pipeline, it lacks {', '.join(missing)}: put them "
                                f"beside it, or give autoencoder, text_encoders or tokenizers")
    scheduler = home / "scheduler" / "scheduler_config.json"  # a hub folder without it is incomplete
    return Sources(path=place or main.path, family=family, transformer=main, text_encoders=encoders, tokenizers=spell,
                   autoencoder=weights.open_autoencoder(vae, family=family),
                   scheduler=scheduler if scheduler.is_file() or (home / "model_index.json").is_file() else None)


def _first(files: Iterable[Path], role: str) -> Path | None:
    """The file that holds this part: of several the largest, which has the widest dtype.

    A CLIP of sizes that are neither CLIP-L's nor CLIP-G's goes by its file's name.
    """
    def holds(file: Path) -> bool:
        found = weights.roles(file)
        return role in found or ("clip" in found and role in file.stem.lower())

    return max(filter(holds, files), key=lambda file: file.stat().st_size, default=None)


def _given_encoders(paths: Sequence[PathLike], family: str) -> dict[str, Stored]:
    """Text encoders in files or folders of their own, or several in a merged file, by their roles."""
    found: dict[str, Stored] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for role in weights.roles(path):
            if role in ("transformer", "autoencoder"):
                continue
            stored = weights.open_text_encoder(path, which=None if role == "clip" else role)
            if role == "clip":  # of sizes that are neither CLIP-L's nor CLIP-G's: in the order they are given
                role = next((r for r in FOLDERS[family] if r.startswith("clip") and r not in found), role)
            if role in found:
                raise ValueError(f"text_encoders: {path} holds another {role}, after {found[role].path}")
            found[role] = stored
    return {role: found[role] for role in FOLDERS[family] if role in found}


def _tokenizers(given: PathLike | Sequence[PathLike] | None, home: Path, family: str,
                encoders: dict[str, Stored]) -> dict[str, Path]:
    if given is not None and not isinstance(given, str | Path):
        if len(given) != len(encoders):
            raise ValueError(f"tokenizers: {len(given)} for {len(encoders)} text encoders ({', '.join(encoders)}): "
                             "give one for each, or the folder that holds tokenizer/, tokenizer_2/, …")
        return dict(zip(encoders, map(Path, given), strict=True))
    folder = home if given is None else weights.resolve(given)
    places = {role: folder / f"tokenizer{number}" for role, number in FOLDERS[family].items()}
    return {role: place for role, place in places.items() if place.is_dir()}
