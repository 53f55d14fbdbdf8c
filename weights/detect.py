"""What a file or folder is, judged once from headers alone: which networks, of which family and variant, and what a
pipeline lacks. `python -m weights` prints it, loading acts on it, errors quote it."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from torch import nn

import mmdit

from . import configs, tables
from .checkpoints import FAMILIES, PIPELINES, told
from .files import PICKLES, STEMS, SUFFIXES, TensorEntry, find_weights, lacking, list_tensors, read_json, resolve
from .layouts import CheckpointError, Layout, Sizes

PathLike = str | os.PathLike


class Kind(NamedTuple):
    """A kind of network: its part in a pipeline, its classes, and its layouts."""

    role: str
    module: type[nn.Module]
    config: type
    layouts: tuple[Layout, ...]  # the original, the hub's, others that are read only


KINDS = FLUX, FLUX2, SD3, AUTOENCODER, CLIP, T5, DECODER = (
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.FLUX_ORIGINAL, tables.FLUX_HUB)),
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.FLUX2_ORIGINAL, tables.FLUX2_HUB)),
    Kind("transformer", mmdit.MMDiT, mmdit.MMDiTConfig, (tables.SD3_ORIGINAL, tables.SD3_HUB)),
    Kind("autoencoder", mmdit.Autoencoder, mmdit.AutoencoderConfig,
         (tables.AUTOENCODER_ORIGINAL, tables.AUTOENCODER_HUB)),
    Kind("clip", mmdit.ClipTextEncoder, mmdit.ClipConfig, (tables.CLIP, tables.CLIP, tables.CLIP_BARE)),
    Kind("t5", mmdit.T5Encoder, mmdit.T5Config, (tables.T5, tables.T5)),
    Kind("text", mmdit.TextDecoder, mmdit.DecoderConfig, (tables.DECODER, tables.DECODER)),
)
ENCODERS = ("text", "clip_l", "clip_g", "clip", "t5")

# Patterns of names that only unsupported models have, and what such a file is. The first match counts.
FOREIGN = {
    r"lora|dora_|hada_w|lokr_w": "a LoRA, a small change to a model",
    r"(^|\.)controlnet_|(^|\.)input_hint_block|^control_model\.": "a ControlNet, not the model that it controls",
    r"\.(absmax|quant_map|qweight|SCB)$|\.bitsandbytes__": "quantized to 4 or 8 bits (such as bitsandbytes' NF4)",
    r"^redux_(up|down)\.": "FLUX.1-Redux, an adapter for image prompts",
    r"distilled_guidance_layer": "Chroma, a FLUX.1 without modulation layers",
    r"(^|\.)label_emb\.|^add_embedding\.|^conditioner\.": "SDXL, which is no MMDiT",
    r"(^|\.)input_blocks\.0\.0\.weight|^down_blocks\.0\.resnets\.0\.": "Stable Diffusion 1 or 2, which is no MMDiT",
    r"\A(?![\s\S]*\bbn\.running_mean$)[\s\S]*\b(post_)?quant_conv\.": "an autoencoder of Stable Diffusion 1, 2 or XL",
    r"\A(vision_model\..*\n?)+\Z": "the image encoder of a CLIP, not its text encoder",
}

# Names of no part of a network: markers; what training leaves; the other half of a model whose text encoder is read.
MARKER = r"(.*\.)?(logit_scale|position_ids|scaled_fp8|tekken_model|num_batches_tracked)"
UNUSED = (r"(optimizer|lr_scheduler|(model_)?ema|loss|discriminator|global_step|epoch)([._].*)?|"
          r"(vision_model|visual_projection|lm_head|decoder\.(block|final_layer_norm|embed_tokens))\..*")
BESIDE_DECODER = r"(.*\.)?(lm_head|vision_tower|multi_modal_projector)\..*"  # in every public file, so worth no warning


@dataclass(frozen=True, eq=False)
class Part:
    """One network in a checkpoint: its kind and layout, and its tensors' entries under the layout's names."""

    kind: Kind
    layout: Layout
    prefix: str  # before its names in the file
    entries: dict[str, TensorEntry]
    path: Path  # its file, or its folder on the hub
    config: configs.Json | None  # the config.json beside hub weights
    unused: tuple[str, ...]  # names in the file that belong to no network

    def shape(self, ours: str) -> tuple[int, ...] | None:
        """Of the stored tensor, the first of several that are concatenated to ours; None: there is none."""
        try:
            return self.entries[self.layout.find(ours, Sizes())[0][0]].shape
        except (KeyError, CheckpointError):  # the file, or the layout, has no such tensor
            return None

    def __getitem__(self, ours: str) -> tuple[int, ...]:
        shape, axes = self.shape(ours), 1 if re.search(r"\.norm|_mean", ours) else 2
        if shape is None or len(shape) < axes or 0 in shape:
            name, has = self.layout.find(ours, Sizes())[0][0], "is missing" if shape is None else f"has shape {shape}"
            raise CheckpointError(f"tensor {self.prefix}{name} {has}, expected {axes} axes or more: download it again")
        return shape

    def count(self, ours: str) -> int:
        """The number of blocks, counted by a tensor that each has."""
        return next(i for i in count() if self.shape(ours.format(i)) is None)

    @property
    def role(self) -> str:
        """transformer, autoencoder, clip_l, clip_g, t5, text; clip where nothing tells which one it is."""
        if self.kind is not CLIP:
            return self.kind.role
        width = (self.shape("token_embedding.weight") or (0,))[-1]
        words = {"clip_l": "clip_l", "clip_g": "clip_g", "text_encoder_2": "clip_g", "text_encoder": "clip_l"}
        names = (self.prefix, {768: "clip_l", 1280: "clip_g"}.get(width, ""), self.path.name.lower())
        return next((role for name in names for word, role in words.items() if word in name), "clip")

    @property
    def family(self) -> str | None:
        """Of a transformer, and of an autoencoder whose tensors, prefix, name or config.json tell it."""
        is_sd3 = self.prefix.endswith(tables.AUTOENCODER_ORIGINAL.prefix) or "sd3" in self.path.name.lower()
        scaling = (self.config or {}).get("scaling_factor")
        usual = next((family for family, its in configs.LATENTS.items() if its["scaling"] == scaling), None)
        told = "flux2" if self.shape("latent_mean") else "sd3" if is_sd3 else usual
        return {FLUX: "flux", FLUX2: "flux2", SD3: "sd3", AUTOENCODER: told}.get(self.kind)


def read_parts(weights: Path, place: Path) -> list[Part]:
    """The networks in a file, or in the shards of an index. Raises CheckpointError for a file without any."""
    if shard := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", weights.name):
        raise CheckpointError(f"{weights} is one of {int(shard[1])} shards: give the folder of all and their index")
    entries = list_tensors(weights)
    config = read_json(weights.parent / "config.json") if weights.name.startswith(STEMS) else None
    lines, first = "\n".join(entries), next(iter(entries), "none at all")
    what = next((what for pattern, what in FOREIGN.items() if re.search(pattern, lines, re.MULTILINE)), None)
    if what or not (parts := recognize(entries, place, config)):
        what = what or f"no part of FLUX.1, FLUX.2 or SD3 that is known here (its first tensor: {first})"
        raise CheckpointError(f"{weights} is {what}: give another file")
    return parts


def recognize(entries: Mapping[str, TensorEntry], path: Path, config: configs.Json | None = None) -> list[Part]:
    """The networks of known kinds among the tensors of a file, whatever prefix stands before their names."""
    found: dict[tuple[Kind, Layout, str], dict[str, TensorEntry]] = {
        (kind, layout, name.removesuffix(layout.sign)): {} for kind in KINDS for layout in kind.layouts
        for name in entries if f".{name}".endswith(f".{layout.sign}")
        and not (layout is tables.CLIP_BARE and re.search(r"(text|vision)_model\.encoder", name))}
    silent = f"{MARKER}|{BESIDE_DECODER}" if DECODER in {kind for kind, *_ in found} else MARKER
    unused = []
    for name, entry in entries.items():
        prefix = max((prefix for *_, prefix in found if name.startswith(prefix)), key=len, default=None)
        own = name.removeprefix(prefix or "")
        if prefix is None or re.fullmatch(f"{MARKER}|{UNUSED}", own):
            unused += [] if re.fullmatch(silent, own) else [name]
            continue
        for (_, layout, start), tensors in found.items():
            usual = re.sub(*layout.alias, own)
            if start == prefix and (usual == own or prefix + usual not in entries):
                tensors[usual] = entry
    return [Part(*key, tensors, path, config, tuple(unused)) for key, tensors in found.items()]


def parts_at(root: Path) -> tuple[list[Part], dict[Path, Exception]]:
    """The networks in a file, or in a folder: the hub's folders first, then single files by name; and the files and
    folders that were refused, with their errors. Raises the error for a single file."""
    if root.is_file():
        return read_parts(root, root), {}
    hub = [root / name for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")]
    places = {folder: weights for folder in (*hub, root) if (weights := find_weights(folder))}
    for folder in [root, root / "text_encoders", *(folder for folder in hub if folder not in places)]:
        places |= {file: file for file in sorted(folder.glob("*")) if file.suffix in (*SUFFIXES, ".gguf", *PICKLES)
                   and not (file.is_dir() or file.name.startswith(STEMS) and file.suffix in (".safetensors", ".bin"))}
    parts, refused = [], {}
    for place, weights in places.items():
        try:
            parts += read_parts(weights, place)
        except (CheckpointError, FileNotFoundError) as error:
            refused[place] = error
    return parts, refused


@dataclass(frozen=True)
class Checkpoint:
    """What `inspect_checkpoint` found. `family` and `variant` are None where there is no transformer."""

    path: Path
    family: str | None  # "flux", "flux2" or "sd3"
    variant: str | None  # the public checkpoint that it is taken for
    told: str  # how the variant is known
    parts: dict[str, Part]  # by role
    tokenizers: dict[str, Path]  # folders by role of the text encoder; or a file of weights that holds Mistral's
    scheduler: Path | None  # scheduler_config.json
    missing: dict[str, str]  # what a pipeline of the family lacks: where the public checkpoints have it
    beside: dict[Path, Exception | str]  # other weight files there: why each was refused, or what it holds

    @property
    def damaged(self) -> dict[str, Exception]:
        """By role, what is wrong with what stands in a missing part's place: it cannot be read, or is not whole."""
        return {role: error for role, where in self.missing.items() for place, error in self.beside.items()
                if isinstance(error, Exception) and (place.name == where.split("/")[0] or role in place.name)
                and ("optional" not in where or place.exists())}

    def check(self) -> None:
        """Raises FileNotFoundError where a pipeline lacks parts, with the errors of the files that were refused, and
        CheckpointError where a part that may be left out is there and damaged."""
        lacks = [f"{name} ({where})" for name, where in self.missing.items()
                 if "optional" not in where and ("with t5" not in where or "t5" in self.parts)]
        refused = [str(error) for error in self.beside.values() if isinstance(error, Exception)]
        if lacks or self.family is None:
            raise FileNotFoundError("; ".join([
                f"{self.path} is no whole pipeline, it lacks {', '.join(lacks) or 'a transformer'}: put them there, or "
                "give autoencoder, text_encoders or tokenizers", *refused]))
        for role, error in self.damaged.items():  # without SD3's T5 it would paint otherwise
            raise CheckpointError(f"{error}; or remove it to paint without {role.upper()}")


def inspect_checkpoint(path: PathLike | None = None, *, transformer: PathLike | None = None,
                       autoencoder: PathLike | None = None, text_encoders: Sequence[PathLike] | None = None,
                       tokenizers: PathLike | None = None, variant: str | None = None,
                       download: bool = False) -> Checkpoint:
    """What the checkpoint at `path` is, from its headers alone, with the parts that are given instead of its own.

    `path` is a file (original, merged, one network), a folder in the hub's layout or with original files, or a name
    (`resolve`). The parts of the transformer's own file count first, then the hub's folders around it, then the other
    files there, those named after the part first. `tokenizers` is the folder that holds `tokenizer/`, `tokenizer_2/`,
    …; `variant` the public checkpoint that it is taken for. Raises CheckpointError (a ValueError) for a damaged file or
    an unsupported model, with its kind, FileNotFoundError for a missing one.
    """
    root = resolve(transformer if path is None else path, download=download)
    encoders = [text_encoders] if isinstance(text_encoders, PathLike) else text_encoders or ()
    return _inspect(root, _given(transformer, autoencoder, encoders), tokenizers, variant)


def _inspect(root: Path, found: dict[str, Part], tokenizers: PathLike | None = None, variant: str | None = None,
             alone: bool = False) -> Checkpoint:
    """`inspect_checkpoint`, to which `found` are given; `alone`: of a file, without reading those around it."""
    home = root if root.is_dir() else root.parent
    parts, refused = parts_at(root)
    main = found.get("transformer") or _main(root, parts)
    if main and root.is_file() and not alone:
        around, refused = parts_at(home)
        parts += [part for part in around if part.path != root]
    family = main.family if main else _pipeline_family(root)
    for part in sorted(parts, key=lambda part: _rank(part, main)):
        if main is None or part.kind is not AUTOENCODER or part.family in (None, family)[family == "flux2":]:
            found.setdefault(part.role, part)
    if not found:
        raise [*refused.values(), FileNotFoundError(f"{root} holds no .safetensors file: give another path")][0]
    wanted = FAMILIES.get(family, {})
    found = {role: found[role] for role in (wanted if main else sorted(found)) if role in found}
    folder = home if tokenizers is None else resolve(tokenizers)
    spell = {role.removeprefix("tokenizer of "): folder / where.split("/")[0] for role, where in wanted.items()
             if role.startswith("tokenizer") and (folder / where.split("/")[0]).is_dir()}
    if "text" in found and "text" not in spell and (file := found["text"].path).is_file():
        spell |= {"text": file} if any("tekken_model" in name for name in list_tensors(file)) else {}  # ComfyUI's
    used, is_hub = {part.path for part in found.values()}, (home / "model_index.json").is_file()
    have = {*found, *(f"tokenizer of {role}" for role in spell)}
    if is_hub and (cut := lacking(home)):
        refused[home / cut] = FileNotFoundError(f"{home / cut} is missing: an interrupted download, run it again")
    return Checkpoint(
        root, family, *told(main, variant, read_json(home / "model_index.json") or {}), found, spell,
        scheduler=home / "scheduler" / "scheduler_config.json" if is_hub else None,
        missing={name: where for name, where in wanted.items() if name not in have},
        beside={**refused, **{part.path: f"holds {part.role}" for part in parts if part.path not in used}})


def find_parts(path: PathLike, roles: Sequence[str], component: str | None = None) -> list[Part]:
    """The networks of these roles at a path, or in the folder `component` there. Raises CheckpointError for none."""
    root = resolve(path, component)
    root = root / component if component and (root / component).is_dir() else root
    judged = _inspect(root, {}, alone=True)
    parts = judged.parts.values()
    if found := [part for part in parts if part.role in roles or (part.role == "clip" and "clip" in "".join(roles))]:
        return found
    refused = [str(error) for error in judged.beside.values() if isinstance(error, Exception)]
    held = "; ".join([*(f"{part.role} ({part.layout.name})" for part in parts), *refused])
    raise CheckpointError(f"{root} holds no {' or '.join(roles)} but {held}: give another file")


def _given(transformer: PathLike | None, autoencoder: PathLike | None, encoders: Sequence[PathLike]) -> dict[str, Part]:
    """The parts at the paths that are given for them, by role."""
    found, wanted = {}, [(transformer, ["transformer"], "transformer"), (autoencoder, ["autoencoder"], "vae")]
    for path, roles, component in [*wanted, *((encoder, ENCODERS, None) for encoder in encoders)]:
        for part in [] if path is None else find_parts(path, roles, component):
            if part.role in found:
                raise CheckpointError(f"{path} holds another {part.role}, after {found[part.role].path}: give one")
            found[part.role] = part
    return found


def _main(root: Path, parts: list[Part]) -> Part | None:
    """The transformer of a file or folder: the one in the hub's folder, else the only one."""
    transformers = [part for part in parts if part.role == "transformer"]
    transformers = [part for part in transformers if part.path.is_dir()] or transformers
    if len(transformers) > 1:
        names = ", ".join(f"{part.path.name}: {part.prefix}*" for part in transformers)
        raise CheckpointError(f"{root} holds several transformers ({names}): give a file with one of them")
    return next(iter(transformers), None)


def _pipeline_family(folder: Path) -> str | None:
    """The family that a folder's model_index.json names. Raises CheckpointError for another pipeline's."""
    name = (read_json(folder / "model_index.json") or {}).get("_class_name")
    if name and str(name) not in PIPELINES:
        raise CheckpointError(f"{folder} is a {name!s:.60}, not FLUX.1, FLUX.2 or SD3: give a folder of one of these")
    return PIPELINES.get(str(name))


def _rank(part: Part, main: Part | None) -> tuple:
    """The order in which parts are taken; the size of a file does not matter."""
    words = ("ae", "vae") if part.kind is AUTOENCODER else (part.role,)
    named = any(word in part.path.stem.lower() for word in words)
    return main is None or part.path != main.path, not part.path.is_dir(), not part.family, not named, part.path.name
