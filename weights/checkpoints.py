"""The public checkpoints, a row each: sizes, names on hub and disk, sampling settings; and the bundled ones.

Steps, guidance and schedule are those of the model cards; repulsion has the paper's settings (arXiv:2603.28762) for the
models that it reports on.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmdit import PRESETS, MMDiTConfig
from repulsion import Repulsion

from . import configs
from .layouts import CheckpointError

if TYPE_CHECKING:
    from .detect import Part

BUNDLED = {name: Path(__file__).parent / "checkpoints" / name for name in ("tiny-sd3", "tiny-flux", "tiny-turbo")}


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is sampled where a call does not say. Sizes in pixels."""

    steps: int
    guidance: float | None = None  # classifier-free, or of FLUX's guidance embedding; None: neither
    height: int = 1024
    width: int = 1024
    shift: float | None = None  # of the schedule, without a scheduler_config.json; None: by picture size
    prompt_tokens: int | None = None  # of T5; None: as many as the family reads
    repulsion: Repulsion | None = None
    edits: bool = False  # whether it takes a picture to edit
    world: str | None = None  # "tiny": pictures that `tiny.reader` can read


class Public(NamedTuple):
    """A public checkpoint: sizes, repository on the hub, original file, what its names match, sampling settings."""

    config: MMDiTConfig
    hub: str
    file: str
    called: str  # pattern, in lower case
    settings: Settings


_FLUX = Repulsion(scale=5e8, iterations=50, steps=1)  # the paper's settings, η where it reports its figures
_LARGE = Repulsion(scale=5e5, iterations=100, steps=4)
_FLUX2 = Settings(50, 4.0, edits=True)
# not measured on the real weights: docs/checkpoints.md says why these settings
_KLEIN = replace(_FLUX2, steps=4, guidance=None, repulsion=Repulsion(strength=0.5, until=0.95))

PUBLIC = {name: Public(PRESETS[name], *row) for name, row in {
    # of several with one transformer's sizes, the first whose names match counts; the last where none does
    "flux1-kontext-dev": ("black-forest-labs/FLUX.1-Kontext-dev", "flux1-kontext-dev.safetensors", r"kontext",
                          Settings(28, 2.5, repulsion=_FLUX, edits=True)),
    "flux1-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors", r"flux[^a-z]*dev(?![a-z])",
                  Settings(28, 3.5, repulsion=_FLUX)),
    # trained on without the guidance embedding, for classifier-free guidance: a transformer like schnell's
    "flux1-dev-de-distill": ("nyanko7/flux-dev-de-distill", "consolidated_s6700.safetensors",
                             r"de-?distill|(?<![a-z])dev(?![a-z])", Settings(28, 3.5)),
    "flux1-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors", r"schnell",
                      Settings(4, shift=1.0, prompt_tokens=256)),
    "flux2-dev": ("black-forest-labs/FLUX.2-dev", "flux2-dev.safetensors", r"flux[^a-z]*2[^a-z]*dev", _FLUX2),
    # klein is distilled from a base of the same sizes
    "flux2-klein-base-9b": ("black-forest-labs/FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors",
                            r"klein.*base|base.*klein", _FLUX2),
    "flux2-klein-9b-kv": ("black-forest-labs/FLUX.2-klein-9b-kv", "flux-2-klein-9b-kv.safetensors", r"klein.*kv",
                          replace(_KLEIN, edits=False)),  # it reads references with an attention that is not here
    "flux2-klein-9b": ("black-forest-labs/FLUX.2-klein-9B", "flux-2-klein-9b.safetensors", r"klein", _KLEIN),
    "flux2-klein-base-4b": ("black-forest-labs/FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors",
                            r"klein.*base|base.*klein", _FLUX2),
    "flux2-klein-4b": ("black-forest-labs/FLUX.2-klein-4B", "flux-2-klein-4b.safetensors", r"klein", _KLEIN),
    "sd3-medium": ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3_medium.safetensors", r"3[^a-z5]*medium",
                   Settings(28, 7.0, shift=3.0)),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors", r"3[._]?5[^a-z]*medium",
                     Settings(40, 4.5, shift=3.0)),
    "sd3.5-large-turbo": ("stabilityai/stable-diffusion-3.5-large-turbo", "sd3.5_large_turbo.safetensors", r"turbo",
                          Settings(4, shift=3.0, repulsion=replace(_LARGE, steps=1))),
    "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors",
                    r"3[._]?5[^a-z]*large(?![a-z])", Settings(28, 4.5, shift=3.0, repulsion=_LARGE)),
}.items()}


# The parts of each family's pipelines, by role: the hub's folder, or the public file that has it.
FAMILIES = {
    "flux": {"transformer": "transformer/, or such as flux1-dev.safetensors", "autoencoder": "vae/ or ae.safetensors",
             "clip_l": "text_encoder/ or clip_l.safetensors", "t5": "text_encoder_2/ or t5xxl_fp16.safetensors",
             "tokenizer of clip_l": "tokenizer/", "tokenizer of t5": "tokenizer_2/"},
    "flux2": {"transformer": "transformer/, or such as flux2-dev.safetensors",
              "autoencoder": "vae/ or flux2-vae.safetensors", "text": "text_encoder/ or qwen_3_4b.safetensors",
              "tokenizer of text": "tokenizer/"},
    "sd3": {"transformer": "transformer/ or sd3.5_medium.safetensors, for example",
            "autoencoder": "vae/ or sd3.5_medium.safetensors, for example",
            "clip_l": "text_encoder/ or clip_l.safetensors", "clip_g": "text_encoder_2/ or clip_g.safetensors",
            "t5": "text_encoder_3/ or t5xxl_fp16.safetensors, optional", "tokenizer of clip_l": "tokenizer/",
            "tokenizer of clip_g": "tokenizer_2/", "tokenizer of t5": "tokenizer_3/, with t5"},
}

# The family of each pipeline that a hub folder's model_index.json names.
PIPELINES = {"FluxPipeline": "flux", "FluxKontextPipeline": "flux", "Flux2Pipeline": "flux2",
             "Flux2KleinPipeline": "flux2", "Flux2KleinKVPipeline": "flux2", "StableDiffusion3Pipeline": "sd3"}


def told(main: "Part | None", given: str | None, index: configs.Json) -> tuple[str | None, str]:
    """The public checkpoint that a transformer is taken for, and how that is known; `index` is model_index.json."""
    if given is not None and given not in PUBLIC:
        raise CheckpointError(f"variant must be one of {', '.join(PUBLIC)}, got {given!r}")
    try:
        fields = configs.fields(main)
    except (AttributeError, CheckpointError):  # no transformer; or loading says what is wrong with it
        return given, ""

    def build(sizes: Mapping[str, object]) -> tuple[object, ...]:
        return (sizes["position"], sizes["pooled_dim"] is None, sizes["guidance_embedding"], sizes["qk_norm"],
                bool(sizes["dual_attention_blocks"]))

    if given and build(vars(PUBLIC[given].config))[:2] != build(fields)[:2]:
        raise CheckpointError(f"{main.path} is of another family than variant {given}: leave it out")
    exact = [name for name, row in PUBLIC.items() if fields.items() <= vars(row.config).items()]
    alike = exact or [name for name, row in PUBLIC.items() if build(vars(row.config)) == build(fields)]
    alike = alike or [name for name, row in PUBLIC.items() if build(vars(row.config))[:2] == build(fields)[:2]]
    if "is_distilled" in index:  # klein's pipelines say it
        alike = [name for name in alike if ("-base" in name) != index["is_distilled"]] or alike
    if "Klein" in (name := str(index.get("_class_name"))):
        alike = [row for row in alike if row.endswith("-kv") == ("KV" in name)] or alike
    sizes = "" if exact else ", sizes of its own"
    named = given or told_by_name(alike, main.path)
    how = "as given" if given else "by its name" if named else "assumed: its name does not tell"
    return named or alike[-1], how + sizes if given or len(alike) > 1 else sizes.removeprefix(", ")


def told_by_name(candidates: Collection[str], path: Path) -> str | None:
    """Which of these public checkpoints the names of a file or folder suggest; None: none of them.

    Its own name counts, then that of the folder around it, or of the repository where it lies in the hub's cache,
    models--org--name/snapshots/<hash>/transformer/…; then the same of what a link leads to.
    """
    paths = [re.sub("/(transformer|snapshots/[^/]+)(?=/|$)", "", place.as_posix().lower())
             for place in (path.absolute(), path.resolve())]
    return next((name for path in paths for part in path.split("/")[:-3:-1] for name in PUBLIC
                 if name in candidates and re.search(PUBLIC[name].called, part)), None)
