"""The options of `python -m sampler`, and how a program ends. Imports no torch, so that --help answers at once."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

METHODS = ("cads", "particle", "sparke", "diverseflow", "interval", "sgi", "fsg", "dave", "stride", "coupled", "pink",
           "seedvariance", "teacher", "cno")  # the keys of `sampler.methods.METHODS`
OF_A_LINE = ("images", "seed", "steps", "guidance", "negative", "height", "width", "image", "true_guidance",
             "skip_layers", "skip_scale", "strength", "method", "scale", "iterations", "repel_steps", "repel_until",
             "blocks", "branches")  # what a line of --prompts may give besides its prompt
DESCRIPTION = "The same seeds twice: a typical batch, and one whose samples repel each other."
EPILOG = """\
In every joint attention of the model the text tokens of a sample attend to its image. In the first --repel-steps steps
and in --blocks, the text tokens that the attention returns are pushed apart, along the gradient of the batch's entropy.

examples:
  python -m sampler "a circle"
  python -m sampler "a star and a square" --images 4 --seed 7 --strength 1 --blocks middle
  python -m sampler "a circle" --method cads --strength 0.5
  python -m sampler "a cat" --model path/to/stable-diffusion-3.5-large --images 4
  python -m sampler --prompts prompts.txt --images 4 --no-compare --out outputs/many
  torchrun --nproc-per-node 2 -m sampler "a circle" --images 10

The pictures, base.png, repelled.png, compare.png and summary.json go to outputs/<prompt>, or to --out.
Too alike? Raise --strength or --repel-steps. Too far from the prompt? Lower them, or repel in fewer blocks."""


def blocks(text: str) -> str | tuple[int, ...]:
    """ "all", "first", "middle", "last", or indices as in 0-3,7."""
    return text if text in ("all", "first", "middle", "last") else indices(text, "all, first, middle, last or ")


def indices(text: str, other: str = "") -> tuple[int, ...]:
    """Indices as in 0-3,7."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {other}a list such as 0-3,7")
    ranges = [[int(n) for n in part.split("-")] for part in text.split(",")]
    if any(r[0] > r[-1] for r in ranges):
        raise argparse.ArgumentTypeError(f"{text!r} has a range that goes down: write it as in 0-3")
    return tuple(i for r in ranges for i in range(r[0], r[-1] + 1))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m sampler", description=DESCRIPTION, epilog=EPILOG,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", help="what the pictures should show")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, or JSON lines; a folder each")
    p.add_argument("--model", metavar="PATH", help="bundled checkpoint, folder, file or hub name (default: tiny-sd3)")
    p.add_argument("--images", type=int, default=8, help="pictures in the batch (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="picture i depends on it and i alone (default: %(default)s)")
    p.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    p.add_argument("--guidance", type=float, help="weight of the prompt (default: the checkpoint's)")
    p.add_argument("--negative", metavar="PROMPT", help="prompt of the unconditional branch (default: empty)")
    p.add_argument("--height", type=int, help="pixels (default: the checkpoint's; with --image about that picture's)")
    p.add_argument("--width", type=int, help="pixels (likewise)")
    p.add_argument("--image", type=Path, metavar="FILE", nargs="+", help="to edit (FLUX.1-Kontext; FLUX.2: or several)")
    p.add_argument("--true-guidance", type=float, metavar="W", help="distilled FLUX: classifier-free, with --negative")
    p.add_argument("--skip-layers", type=indices, metavar="LIST", help="SD3.5-medium: skip-layer guidance, usually 7-9")
    p.add_argument("--skip-scale", type=float, metavar="S", help="weight of skip-layer guidance (default: 2.8)")
    r = p.add_argument_group("diversity (defaults: the checkpoint's)")
    r.add_argument("--strength", type=float, metavar="S", help="length of the push over the tokens, 0.5 to 1")
    r.add_argument("--method", choices=["repulsion", *METHODS], default="repulsion", help="repulsion, or a rival")
    r.add_argument("--scale", type=float, help="η, instead of a strength: the step size, in a unit of the model")
    r.add_argument("--iterations", type=int, help="M, the number of gradient steps in one push")
    r.add_argument("--repel-steps", type=int, help="τ: repel in that many of the first denoising steps")
    r.add_argument("--repel-until", type=float, metavar="σ", help="instead: in the steps down to this noise level")
    r.add_argument("--blocks", type=blocks, help="all, first, middle, last (thirds), or indices such as 0-3,7")
    r.add_argument("--branches", choices=["all", "conditional"], help="of classifier-free guidance: which are pushed")
    m = p.add_argument_group("where --model does not hold everything, or memory is short")
    m.add_argument("--transformer", metavar="PATH", help="a file or folder, instead of --model's")
    m.add_argument("--autoencoder", metavar="PATH", help="likewise, such as ae.safetensors")
    m.add_argument("--text-encoders", metavar="PATH", nargs="+", help="likewise, such as clip_l.safetensors and t5xxl…")
    m.add_argument("--tokenizers", metavar="PATH", help="the folder that holds tokenizer/, tokenizer_2/, …")
    m.add_argument("--variant", metavar="NAME", help="public checkpoint whose settings count: flux1-kontext-dev, …")
    m.add_argument("--shift", type=float, metavar="S", help="of the schedule (default: the checkpoint's)")
    m.add_argument("--offload", choices=["parts", "blocks"], help="one network in memory at a time; or one block")
    m.add_argument("--compile", action="store_true", help="compiles the blocks: a minute at first, then faster steps")
    m.add_argument("--keep-float8", action="store_true", help="keeps float8 weights in float8, in half the memory")
    m.add_argument("--shard", action="store_true", help="with torchrun: parameters are spread over the ranks")
    o = p.add_argument_group("output")
    o.add_argument("--out", type=Path, help="folder for the files (default: outputs/<prompt>, numbered if taken)")
    o.add_argument("--overwrite", action="store_true", help="replace --out if all in it was written by this program")
    o.add_argument("--no-compare", action="store_true", help="without the typical batch, in half the time")
    o.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored; GPU: bfloat16")
    o.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    return p


def options_of(line: dict[str, object], others: argparse.Namespace) -> argparse.Namespace:
    """The options that a line of --prompts gives, by their names, in place of those of the command line, `others`.

    Raises ValueError for names and values that are not such options'.
    """
    if not isinstance(line.get("prompt"), str) or not line["prompt"].strip():
        raise ValueError('it has no "prompt" with a text')
    if unknown := line.keys() - {"prompt", *OF_A_LINE}:
        raise ValueError(f"{min(unknown)!r} is none of prompt, {', '.join(OF_A_LINE)}")
    words, p = [], parser()
    for name, value in line.items():
        if name != "prompt" and value is not None:
            option = f"--{name.replace('_', '-')}"
            value = ",".join(map(str, value)) if isinstance(value, list) and name != "image" else value
            words += [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]

    def refuse(message: str) -> None:
        raise ValueError(message)

    p.error = refuse
    p.set_defaults(**vars(others))
    return p.parse_args([*words, "--", line["prompt"]])


def exit_code(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> int:
    """Parse the options and run a program: 0; 2, with a message of one line, for a wrong call or file and where memory
    or the device does not suffice; 130 if interrupted; 141 if the output is a pipe that was closed.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an encoding without η
    try:
        try:
            run(parser.parse_args())
        finally:
            sys.stdout.flush()  # a closed pipe is an error here, instead of a traceback while Python exits
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted: {str(interrupt) or 'nothing was written'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError, TypeError) as error:
        print(f"error: {' '.join(sentence(error).split())}", file=sys.stderr)
        return 2
    return 0


def sentence(error: Exception) -> str:
    """What to tell the user of an error. Raises it again where it is a mistake in the program."""
    text = str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|allocate|not enough memory|ALLOC_FAILED", text):
        text = re.sub(r"(\d+) bytes", lambda found: f"{int(found[1]) / 2**30:.2f} GiB", text)
        asked = re.search(r"allocate (\d[\d.]* \w+)", text)
        return (f"out of memory{f' at {asked[1]}' if asked else ''}: try fewer or smaller pictures, or, where this "
                "program has them, --dtype bfloat16 and --offload parts or blocks")
    if isinstance(error, (RuntimeError, TypeError)):
        if "MPS" not in text:
            raise error
        return f"the device mps cannot compute this ({text.splitlines()[0]}): try --device cpu"
    return text
