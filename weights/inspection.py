"""What a checkpoint is, from its headers alone: family, variant, components, and what a pipeline still lacks."""

import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from mmdit import PRESETS

from .files import DTYPES, PICKLES, PIECE, stored_pieces
from .hub import resolve
from .kinds import FLUX, SD3, Recognized, foreign, recognize
from .locate import STEMS, find_weights, list_tensors, read_json
from .names import CheckpointError, Sizes
from .shapes import Shapes
from .variants import told_by_name

FOLDERS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # of the hub
ROLES = ("transformer", "autoencoder", "clip_l", "clip_g", "clip", "t5")
CLIP_TOKENIZER, T5_TOKENIZER = "CLIP", "T5"  # kinds of tokenizers
FAMILIES = {FLUX: "FLUX.1", SD3: "SD3"}

# The parts of a pipeline: name, role or kind, and the public files that have it.
NEEDS = {
    "FLUX.1": [
        ("transformer", "transformer", "flux1-dev.safetensors, for example, or transformer/"),
        ("autoencoder", "autoencoder", "ae.safetensors or vae/"),
        ("clip_l", "clip_l", "clip_l.safetensors or text_encoder/"),
        ("t5", "t5", "t5xxl_fp16.safetensors or text_encoder_2/"),
        ("tokenizer", CLIP_TOKENIZER, "tokenizer/ (vocab.json, merges.txt)"),
        ("tokenizer_2", T5_TOKENIZER, "tokenizer_2/ (spiece.model or tokenizer.json)"),
    ],
    "SD3": [
        ("transformer", "transformer", "sd3.5_medium.safetensors, for example, or transformer/"),
        ("autoencoder", "autoencoder", "sd3.5_medium.safetensors, for example, or vae/"),
        ("clip_l", "clip_l", "clip_l.safetensors or text_encoder/"),
        ("clip_g", "clip_g", "clip_g.safetensors or text_encoder_2/"),
        ("t5", "t5", "t5xxl_fp16.safetensors or text_encoder_3/"),
        ("tokenizer", CLIP_TOKENIZER, "tokenizer/ (vocab.json, merges.txt)"),
        ("tokenizer_2", CLIP_TOKENIZER, "tokenizer_2/ (vocab.json, merges.txt)"),
        ("tokenizer_3", T5_TOKENIZER, "tokenizer_3/ (spiece.model or tokenizer.json)"),
    ],
}
OPTIONAL = {"FLUX.1": (), "SD3": ("t5", "tokenizer_3")}


@dataclass(frozen=True)
class Component:
    """One module: its role, location, storage format and size."""

    role: str  # transformer, autoencoder, clip_l, clip_g, t5; clip where the file does not tell which
    where: str  # its file, or with a slash its folder, relative to what was inspected
    files: int  # more than one: shards
    prefix: str  # before its names in a file that holds several modules
    layout: str
    dtypes: dict[str, int]  # number of tensors in each, by safetensors' names
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect_checkpoint` found. `family` and `variant` are None where there is no transformer."""

    path: str
    family: str | None  # "FLUX.1", "SD3"
    variant: str | None  # the public name; several joined by "or" if the file does not tell; "of its own": other sizes
    components: tuple[Component, ...]
    tokenizers: dict[str, str]  # folder or file: "CLIP" or "T5"
    scheduler: str | None
    missing: dict[str, str]  # parts that a pipeline of the family lacks, and the public files that have them
    optional: dict[str, str]  # likewise, parts that it runs without
    beside: dict[str, str]  # other weight files there: what each holds or is
    not_finite: tuple[str, ...] | None  # the tensors with NaN or infinity; None: not checked


class Found(NamedTuple):
    """A module, and its file or folder."""

    module: Recognized
    place: Path


def inspect_checkpoint(path: str | os.PathLike, check_numbers: bool = False, progress: str | None = None) -> Inspection:
    """Describe the checkpoint at `path` from its headers alone; data are read only with `check_numbers`.

    `path` is a file (original, merged, one component), a component's folder, a pipeline's folder in the hub's layout,
    a folder of original files, a folder of the hub's cache, the name of a bundled checkpoint, or a name on the hub,
    which is looked up in the cache alone. In a folder the first module of each role counts, the hub's folders before
    single files; the other files are listed in `beside`. `check_numbers` reads the data of all components, a piece at a
    time, and lists the tensors that hold NaN or infinity; `progress` names its progress bar. Raises CheckpointError (a
    ValueError) for a damaged file or an unsupported model, with its kind, FileNotFoundError for a missing one.
    """
    root = resolve(path, download=False)
    index = (read_json(root / "model_index.json") if root.is_dir() else None) or {}
    found, beside = _find_in_folder(root, index) if root.is_dir() else (_modules_in(root), {})
    found = sorted(found, key=lambda one: ROLES.index(_role(one)))
    transformer = next((one for one in found if one.module.kind in FAMILIES), None)
    family = FAMILIES[transformer.module.kind] if transformer else _family_of(index)
    tokenizers = _tokenizers(root)
    scheduler = "scheduler/scheduler_config.json"
    lacking = _lacking(family, [*map(_role, found), *tokenizers.values()])
    optional = {name: lacking.pop(name) for name in OPTIONAL.get(family, ()) if name in lacking}
    return Inspection(
        path=str(root), family=family, variant=_variant(transformer.module) if transformer else None,
        components=tuple(_describe(one, root) for one in found), tokenizers=tokenizers,
        scheduler=scheduler if (root / scheduler).is_file() else None, missing=lacking, optional=optional,
        beside=beside, not_finite=_not_finite(found, root, progress) if check_numbers else None,
    )


def _find_in_folder(root: Path, index: dict) -> tuple[list[Found], dict[str, str]]:
    """The components of a folder, and its other weight files."""
    if index.get("_class_name") and _family_of(index) is None:
        raise CheckpointError(f"{root} is a {index['_class_name']}, expected a FluxPipeline or a "
                              "StableDiffusion3Pipeline: give a FLUX.1 or SD3 checkpoint")
    found = [one for name in FOLDERS if _holds_weights(root / name)
             for one in _modules_in(find_weights(root / name), root / name)]
    if any(file.name.startswith(STEMS) or ".safetensors.index" in file.name for file in root.glob("*.safetensors*")):
        found += _modules_in(find_weights(root))  # the folder of one component
    singles, beside = {}, {}
    for file in sorted([*root.iterdir(), *(root / "text_encoders").glob("*")]):
        if file.suffix in (".safetensors", ".gguf", *PICKLES) and not file.name.startswith(STEMS):
            try:
                singles[file] = _modules_in(file)
            except (CheckpointError, FileNotFoundError) as error:
                beside[file.relative_to(root).as_posix()] = str(error).removeprefix(f"{file} ")
    for file in sorted(singles, key=lambda file: all(one.module.kind not in FAMILIES for one in singles[file])):
        taken = {_role(one) for one in found}
        new = [one for one in singles[file] if _role(one) not in taken]
        found += new
        if not new:
            beside[file.relative_to(root).as_posix()] = f"holds {', '.join(map(_role, singles[file]))}"
    if not found:
        for file, what in beside.items():
            raise CheckpointError(f"{root / file} {what}")
        find_weights(root)  # raises, listing what the folder holds
    return found, beside


def _holds_weights(folder: Path) -> bool:
    return any(".safetensors" in file.name or file.suffix in PICKLES for file in folder.glob("*"))


def _modules_in(weights: Path, place: Path | None = None) -> list[Found]:
    """The modules in a file, or in the shards of an index. Raises CheckpointError for a file without any."""
    shard = re.search(r"-\d{5}-of-(\d{5})\.safetensors$", weights.name)
    if shard:
        raise CheckpointError(f"{weights} is one of {int(shard[1])} shards: give the folder that holds all of them and "
                              "their index")
    entries = list_tensors(weights)
    if what := foreign(entries):
        raise CheckpointError(f"{weights} is {what}")
    found = [Found(one, place or weights) for one in recognize(entries)]
    if not found:
        first = next(iter(entries), "none at all")
        raise CheckpointError(f"{weights} is no part of FLUX.1 or SD3 that is known here (its first tensor: {first}): "
                              "give another file")
    return found


def _role(one: Found) -> str:
    """The module's role; for a CLIP of unusual width it follows from the file's or folder's name."""
    if one.module.role != "clip":
        return one.module.role
    name = one.place.name.lower()
    called = {"clip_g": "clip_g", "clip_l": "clip_l", "text_encoder_2": "clip_g", "text_encoder": "clip_l"}
    return next((role for word, role in called.items() if word in name), "clip")


def _describe(one: Found, root: Path) -> Component:
    module, place = one
    table = module.layout.find("position_table", Sizes())[0] if module.kind is SD3 else []  # not a parameter
    dtypes = {}
    for entry in sorted(module.entries.values(), key=lambda entry: -entry.nbytes):  # the largest tensor's dtype first
        word = f"{entry.dtype} scaled" if entry.scale else entry.dtype
        dtypes[word] = dtypes.get(word, 0) + 1
    stored = [entry for whole in module.entries.values() for entry in (whole, whole.scale) if entry]
    where = place.name if place == root else place.relative_to(root).as_posix() + "/" * place.is_dir()
    return Component(
        role=_role(one), where=where, files=len({entry.file for entry in stored}), prefix=module.prefix,
        layout=module.layout.name, dtypes=dtypes, bytes=sum(entry.nbytes for entry in stored),
        parameters=sum(prod(entry.shape) for name, entry in module.entries.items() if name not in table),
    )


def _variant(module: Recognized) -> str:
    """The public checkpoints with this transformer's sizes; of several, the one that the file's name suggests."""
    file = next(iter(module.entries.values())).file
    stored = Shapes(module.entries, module.layout, module.prefix)
    try:
        fields = module.kind.fields(stored)
        given, returned = fields["latent_channels"] * fields["patch_size"] ** 2, stored["image_out.weight"][0]
        if given != returned:
            raise CheckpointError(f"the transformer reads {given} numbers a patch and returns {returned}, so it is one "
                                  "with more inputs (Fill, Canny, Depth): give FLUX.1-dev, -schnell or -Kontext-dev")
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    fitting = [name for name, preset in PRESETS.items() if fields.items() <= vars(preset).items()]
    return told_by_name(fitting, file) or " or ".join(fitting) or "of its own"


def _family_of(index: dict) -> str | None:
    """The family whose pipeline a model_index.json describes."""
    name = str(index.get("_class_name"))
    known = {"StableDiffusion3": "SD3", "Flux2": None, "Flux": "FLUX.1"}
    return next((family for beginning, family in known.items() if name.startswith(beginning)), None)


def _tokenizers(root: Path) -> dict[str, str]:
    """The kind of tokenizer by folder or file."""
    found = {}
    for name in ("tokenizer/", "tokenizer_2/", "tokenizer_3/", "tokenizer.json", "spiece.model"):
        place = root / name
        if name == "spiece.model" and place.is_file() or (place / "spiece.model").is_file():
            found[name] = T5_TOKENIZER
        elif (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
            found[name] = CLIP_TOKENIZER
        elif content := read_json(place if place.suffix == ".json" else place / "tokenizer.json"):
            is_clip = isinstance((content.get("model") or {}).get("vocab"), dict)
            found[name] = CLIP_TOKENIZER if is_clip else T5_TOKENIZER
    return found


def _lacking(family: str | None, have: list[str]) -> dict[str, str]:
    """The parts of a pipeline that are not in `have`, and the public files that have them."""
    lacking, have = {}, list(have)
    for name, what, public in NEEDS.get(family, ()):
        if what in have:
            have.remove(what)
        else:
            lacking[name] = public
    return lacking


def _not_finite(found: list[Found], root: Path, progress: str | None) -> tuple[str, ...]:
    """The names of the tensors that hold NaN or infinity; for a folder, after the file's name."""
    entries = [entry for one in found for whole in one.module.entries.values() for entry in (whole, whole.scale)
               if entry and entry.dtype in DTYPES]
    bad = []
    with tqdm(total=sum(entry.nbytes for entry in entries), unit="B", unit_scale=True, desc=progress,
              disable=progress is None) as bar:
        for entry in sorted(entries, key=lambda entry: (entry.file, entry.start)):
            if not all(map(_is_finite, stored_pieces(entry, PIECE))):
                bad.append(f"{entry.file.relative_to(root)}: {entry.name}" if root.is_dir() else entry.name)
            bar.update(entry.nbytes)
    return tuple(bad)


def _is_finite(piece: torch.Tensor) -> bool:
    """From minimum and maximum, which are NaN if any number is."""
    ends = torch.aminmax(piece.float() if piece.element_size() == 1 else piece)
    return bool(torch.stack(ends).isfinite().all())
