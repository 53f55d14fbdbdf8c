"""`python -m sampler PROMPT`: the same seeds twice, a typical batch and one whose samples repel each other."""

import argparse
import os
import sys

from .options import exit_code, parser


def run(args: argparse.Namespace) -> None:
    from . import program, prompts, ranks  # not before the options are parsed: they import torch

    with ranks.joined() as ours:
        (prompts if args.prompts else program).run(args, ours)


def main() -> int:
    """The exit code, see `exit_code`."""
    options = parser()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["RANK"] != "0":
        options.error = lambda _: sys.exit(2)  # rank 0 says it
    code = exit_code(run, options)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from .ranks import leave

        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
