"""`python -m sampler --prompts FILE`: a group of pictures for each line of a file; started again, it goes on.

`--out` holds a folder for each group, as a single run writes it, and `results.jsonl`, with a line for each finished
one: its folder's name and its summary. The folder appears first, whole, then the line. What a killed run left behind is
put right by the next: a folder without a line gets it, half a line is cut off, half a folder is painted again.
"""

import argparse
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from . import output
from .conditioning import EncodedBefore
from .folders import hold, whole_folder
from .options import options_of
from .pipeline import Pipeline
from .program import Group, load, paint, prepare, write
from .ranks import Ranks

RESULTS = "results.jsonl"


def run(args: argparse.Namespace, ranks: Ranks = Ranks()) -> None:  # noqa: B008
    """Paints what is not there yet: ranks take the lines in turn, or with --shard all ranks paint each group."""
    if args.overwrite:
        raise ValueError("--overwrite replaces the folder of a single run: delete what --prompts is to paint again")
    pipeline, out = load(args), args.out or Path("outputs") / args.prompts.stem
    groups = read(pipeline, args)
    out.mkdir(parents=True, exist_ok=True)
    own = [name for i, name in enumerate(groups) if args.shard or i % ranks.size == ranks.rank]
    painters = ranks if args.shard else Ranks()  # of one group
    own = painters.agree(unfinished(out, {name: groups[name] for name in own}))
    if args.offload and own:
        texts = [text for name in own for text in (groups[name].args.prompt, groups[name].args.negative or "")]
        pipeline.text = EncodedBefore(pipeline.text, list(dict.fromkeys(texts)))
    with ExitStack() as stack:
        if args.offload == "blocks":  # they stay in the CPU's memory
            stack.enter_context(pipeline.parts["transformer"].used(now=False))
        bar = stack.enter_context(tqdm(total=len(groups), initial=count(out, groups), disable=ranks.rank > 0))
        try:
            for name in own:
                make(pipeline, groups[name], out / name, painters)
                if not ranks.rank:
                    bar.update(count(out, groups) - bar.n)
            while ranks.left() and not ranks.rank:
                time.sleep(0.5)
                bar.update(count(out, groups) - bar.n)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished groups were written, and the same command goes on from there") from None
    if not ranks.rank:
        ready = count(out, groups)
        rest = "" if ready == len(groups) else "; another run is at work on the rest"
        print(f"{ready} of {len(groups)} groups are in {out}, with a line each in {RESULTS}{rest}")


def unfinished(out: Path, groups: dict[str, Group]) -> list[str]:
    """The folders of groups that are to be painted. Writes the lines that finished ones lack."""
    lines = finished(out)
    for name, group in groups.items():
        file = out / name / "summary.json"
        if name not in lines and file.is_file():
            lines[name] = json.loads(file.read_text(encoding="utf-8"))
            record(out / name, lines[name])
        if name in lines:
            check_same(group, lines[name], out / name)
    return [name for name in groups if name not in lines]


def make(pipeline: Pipeline, group: Group, folder: Path, ranks: Ranks) -> None:
    """Paints a group into its folder and writes its line, unless another run is at work on it or has finished it."""
    if ranks.rank:
        paint(pipeline, group, ranks)
        return
    with ExitStack() as stack:
        try:
            claim = stack.enter_context(whole_folder(folder))
        except FileExistsError:
            if ranks.size > 1 or folder.exists() and not (folder / "summary.json").is_file():
                raise
            return
        pictures, found, _ = paint(pipeline, group, ranks)
        summary = write(claim.work, pictures, found, group, pipeline.files)
    record(folder, summary)


def read(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, Group]:
    """The groups of a file by the names of their folders: line number and prompt.

    Raises ValueError naming the line that is wrong, before anything is painted.
    """
    try:
        text = args.prompts.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {args.prompts} cannot be read ({error}): give a text file in UTF-8") from error
    groups = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line:
            continue
        try:
            options = options_of(json.loads(line) if line.startswith("{") else {"prompt": line}, args)
            for words in filter(None, (options.prompt, options.negative)):
                pipeline.text.check_length(words)
            group = groups[f"{number:05d}-{output.folder_name(options.prompt)}"] = prepare(pipeline, options)
            pictures = group.open_references()
            for ways in group.batches.values():
                pipeline.plan(options.prompt, options.images, image=pictures, method=ways["method"],
                              **{name: value for name, value in group.call.items() if name != "seed"})
        except ValueError as error:
            raise ValueError(f"{args.prompts}, line {number}: {error}") from error
    if not groups:
        raise ValueError(f"{args.prompts} holds no prompt: write one a line")
    return groups


def check_same(group: Group, summary: dict, folder: Path) -> None:
    """Raises ValueError where a finished group would now be painted otherwise."""
    now = json.loads(json.dumps({**group.about, **group.ways}))
    found = {**summary, "batches": [*summary["batches"]]}
    for side in ("height", "width"):
        if getattr(group.args, side) is None:  # as the checkpoint or a reference has it
            now.pop(side)
    for key, value in {**now, "batches": [*group.batches]}.items():
        before = found.get(key)
        if isinstance(before, dict) and isinstance(value, dict):  # repulsion or method: the settings that differ
            differing = [name for name in before | value if before.get(name) != value.get(name)]
            before, value = ({name: one.get(name) for name in differing} for one in (before, value))
        if before != value:
            raise ValueError(f"{folder} was painted with {key} {before}, and now it would be {value}: choose "
                             "another --out, or give the same options")


def finished(out: Path) -> dict[str, dict]:
    """What `results.jsonl` says of each folder; half a line at its end does not count."""
    file = out / RESULTS
    *lines, _ = file.read_bytes().split(b"\n") if file.exists() else [b""]
    try:
        return {found["folder"]: found for found in map(json.loads, lines)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} holds a line that is not of this program ({error}): choose another --out") from error


def count(out: Path, groups: dict[str, Group]) -> int:
    """How many of the groups are finished."""
    return len(finished(out).keys() & groups)


def record(folder: Path, summary: dict) -> None:
    """Appends the line of a finished group, if it is not there, after cutting off half a line of a killed run."""
    line, lock = {"folder": folder.name, **summary}, hold(folder.parent, wait=True)
    try:
        with (folder.parent / RESULTS).open("a+b") as file:
            file.seek(0)
            found = file.read()
            whole = found[: found.rfind(b"\n") + 1]
            file.truncate(len(whole))
            start = json.dumps({"folder": folder.name})[:-1]
            if f"\n{start},".encode() not in b"\n" + whole:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    finally:
        os.close(lock)
