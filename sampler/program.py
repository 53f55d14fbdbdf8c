"""What `python -m sampler` does: a typical batch and one whose samples repel each other, of the same seeds."""

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from repulsion import Repulsion
from tiny.captions import parse

from . import output, report
from .folders import whole_folder
from .guidance import SkipLayerGuidance
from .methods import METHODS, Method
from .pipeline import Pipeline
from .ranks import Ranks


def settings(args: argparse.Namespace, default: Repulsion | None) -> Repulsion | None:
    """The checkpoint's repulsion with the options given; None beside a rival if no option of repulsion is given."""
    given = {"scale": args.scale, "iterations": args.iterations, "steps": args.repel_steps, "until": args.repel_until,
             "blocks": args.blocks, "branches": args.branches,
             "strength": args.strength if args.method == "repulsion" else None}
    given = {name: value for name, value in given.items() if value is not None}
    if {"steps", "until"} <= given.keys():
        raise ValueError("--repel-steps and --repel-until both say when to repel: give one")
    if args.method != "repulsion" and not given:
        return None
    if "until" in given or "steps" in given:  # instead of the checkpoint's
        given = {"until": None, "steps": 1, **given}
    if "strength" in given:  # M is of the paper's η: a strength is one gradient step where no other M is given
        given = {"iterations": 1, **given}
    if "strength" in given or "scale" in given:
        return replace(default or Repulsion(0.0), **{"strength": None, "scale": None, **given})
    if default is None:
        raise ValueError(f"{name_of(args)} has no default repulsion: say --strength, for example 0.5")
    return replace(default, **given)


def name_of(args: argparse.Namespace) -> str:
    return args.model or args.transformer or "tiny-sd3"


def skip_layer_guidance(args: argparse.Namespace) -> SkipLayerGuidance | None:
    """Skip-layer guidance by --skip-layers and --skip-scale, or None."""
    if args.skip_layers is None:
        if args.skip_scale is not None:
            raise ValueError("--skip-scale needs --skip-layers, for example 7-9")
        return None
    return SkipLayerGuidance(args.skip_layers, **({} if args.skip_scale is None else {"scale": args.skip_scale}))


def method(args: argparse.Namespace) -> Method | None:
    """The rival named by --method, with --strength; None for repulsion."""
    if args.method == "repulsion":
        return None
    return METHODS[args.method](**({} if args.strength is None else {"strength": args.strength}))


def load(args: argparse.Namespace) -> Pipeline:
    """The pipeline of --model and what is given beside it."""
    return Pipeline.load(
        args.model, dtype=getattr(torch, args.dtype or "", None), device=args.device, offload=args.offload,
        keep_float8=args.keep_float8, compile=args.compile, shard=args.shard, transformer=args.transformer,
        autoencoder=args.autoencoder, text_encoders=args.text_encoders, tokenizers=args.tokenizers,
        variant=args.variant, shift=args.shift,
    )


def open_picture(file: Path) -> Image.Image:
    """The picture in a file. Raises ValueError naming the file."""
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {file} is no picture that can be read ({error}): give a PNG or JPEG") from error
    return picture


@dataclass
class Group:
    """What the pictures of one prompt depend on."""

    args: argparse.Namespace
    call: dict  # arguments of the pipeline, but for the prompt, the number of pictures and the references
    batches: dict[str, dict]  # name of a batch → its repulsion and method
    ways: dict[str, dict | None]  # the same, as they are written
    about: dict  # the rest, as it is written

    def open_references(self) -> list[Image.Image] | None:
        """The pictures to edit. Raises ValueError naming the file that is none."""
        return None if self.args.image is None else [open_picture(file) for file in self.args.image]


def prepare(pipeline: Pipeline, args: argparse.Namespace) -> Group:
    """The group that the options ask for. Raises ValueError for what does not fit together or into the model."""
    skip, other = skip_layer_guidance(args), method(args)
    repulsion = settings(args, pipeline.defaults.repulsion)
    if repulsion is not None:
        repulsion.check_blocks(pipeline.config.num_blocks)
    call = {"steps": args.steps, "guidance": args.guidance, "true_guidance": args.true_guidance,
            "negative_prompt": args.negative, "height": args.height, "width": args.width, "seed": args.seed,
            "skip_layer_guidance": skip}
    batches = {} if args.no_compare else {"base": {"repulsion": None, "method": None}}
    batches["repelled" if other is None else args.method] = {"repulsion": repulsion, "method": other}
    about = {"model": name_of(args), "dtype": str(pipeline.dtype).removeprefix("torch."), "shift": args.shift,
             "prompt": args.prompt, "images": args.images,
             **{k: v if v is not None else getattr(pipeline.defaults, k, None) for k, v in call.items()},
             "image": args.image and [str(file) for file in args.image],
             "skip_layer_guidance": None if skip is None else asdict(skip)}
    ways = {"repulsion": None if repulsion is None else asdict(repulsion),
            "method": None if other is None else {"name": args.method, **asdict(other)}}
    return Group(args, call, batches, ways, about)


def run(args: argparse.Namespace, ranks: Ranks = Ranks()) -> None:  # noqa: B008
    """Claims the folder, paints the batches, writes them, prints what is in them; rank 0 does all but the painting."""
    target = args.out or Path("outputs") / output.folder_name(args.prompt)
    with nullcontext() if ranks.rank else whole_folder(target, args.overwrite, numbered=args.out is None) as claim:
        pipeline = load(args)
        group = prepare(pipeline, args)
        if not ranks.rank:
            note(pipeline, group)
        pictures, found, stopped = paint(pipeline, group, ranks, progress=not ranks.rank, keep=ranks.size == 1)
        if ranks.rank:
            return
        if stopped is not None:
            why = f"{type(stopped).__name__}: {stopped}"
            group.about["stopped"] = {name: why for name in group.batches if name not in pictures}
        write(claim.work, pictures, found, group, pipeline.files)
    if stopped is not None:
        print(f"written to {claim.target}: the finished batch alone, {', '.join(pictures)}")
        raise KeyboardInterrupt("the finished batch was written") if isinstance(stopped, KeyboardInterrupt) else stopped
    columns = {"typical" if name == "base" else name: numbers for name, numbers in found.items()}
    print(report.table(columns, args.images))
    print(f"written to {claim.target}{'' if args.no_compare else ': compare.png shows both'}")


def paint(pipeline: Pipeline, group: Group, ranks: Ranks = Ranks(), progress: bool = False,  # noqa: B008
          keep: bool = False) -> tuple[dict, dict, BaseException | None]:
    """The pictures of each batch, the numbers about them (on rank 0), and with `keep` the error or Ctrl-C that ended it
    after a finished batch.

    Every batch is denoised before the first is decoded: with --offload each network is read once.
    """
    args = group.args
    image = group.open_references()
    splits = {name: ranks.split(args.images, **ways) for name, ways in group.batches.items()}
    latents, seconds, pictures, found, stopped, encoded = {}, {}, {}, {}, [], None

    @contextmanager
    def keeping(finished: dict) -> Iterator[None]:
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not (finished and keep):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the memory of what was interrupted
            stopped.append(error)

    with keeping(latents), pipeline.parts["transformer"].used(now=False):
        for name, split in splits.items():
            start = time.perf_counter()
            latents[name], encoded = pipeline(args.prompt, args.images, **group.call, **split, image=image,
                                              encoded=encoded, progress=name if progress else None, decode=False)
            seconds[name] = time.perf_counter() - start
    with keeping(pictures), pipeline.parts["autoencoder"].used():
        for name, latent in latents.items():
            start = time.perf_counter()
            painted = ranks.gather(pipeline.decode(latent))
            seconds[name] = round(seconds[name] + time.perf_counter() - start, 3)
            if painted:
                found[name] = report.describe_batch(painted, args.prompt, pipeline.defaults.world)
                found[name]["seconds"], pictures[name] = seconds[name], painted
    return pictures, found, stopped[0] if stopped else None


def note(pipeline: Pipeline, group: Group) -> None:
    """Says what was taken from where, and what is likely not meant, before anything is painted."""
    if pipeline.defaults.world is None:
        print("; ".join(f"{part}: {where}" for part, where in pipeline.files.items()), file=sys.stderr)
    if group.args.images == 1 and group.ways["repulsion"] is not None:
        print("note: a single picture repels nothing: ask for --images 2 or more", file=sys.stderr)
    if pipeline.defaults.world == "tiny" and group.args.prompt.strip():
        pipeline.text.check_length(group.args.prompt)  # an error, which needs no note
        try:
            parse(group.args.prompt)
        except ValueError as error:
            print(f"note: outside the language of this checkpoint: {error}", file=sys.stderr)
        usual = pipeline.defaults.height
        other = {group.args.height, group.args.width} - {None, usual}
        if other and not any(side % pipeline.multiple for side in other):  # an error, likewise
            print(f"note: this checkpoint learned pictures of {usual} × {usual} pixels alone", file=sys.stderr)


def write(folder: Path, pictures: dict, found: dict, group: Group, files: dict) -> dict:
    """Single pictures, a grid of each batch, both grids side by side, and the numbers → what summary.json holds."""
    ways, (width, height) = group.ways, next(iter(pictures.values()))[0].size
    about = {**group.about, "height": height, "width": width}
    how = [ways["method"]["name"]] if ways["method"] else []
    how += ["contextual repulsion"] if ways["repulsion"] else []
    sheets = []
    for name, batch in pictures.items():
        made = {**about, **(dict.fromkeys(ways) if name == "base" else ways)}
        for i, picture in enumerate(batch):
            output.save_png(picture, folder / f"{name}-{i:02d}.png", {**made, "index": i})
        sheet = output.grid(batch)
        output.save_png(sheet, folder / f"{name}.png", made)
        label = "typical" if name == "base" else f"with {' and '.join(how)}"
        sheets.append((f"{label}: Vendi score {found[name]['vendi']:.2f}", sheet))
    if len(sheets) == 2:
        output.save_png(output.side_by_side(sheets, about["prompt"]), folder / "compare.png", {**about, **ways})
    summary = {**about, **ways, "files": files, "batches": found}
    output.write_summary(folder, summary)
    return summary
