"""Does `--prompts` lose or double a group when it is killed? `python -m benchmarks.survive [--prompts 1000]`.

Paints groups with tiny-turbo twice: undisturbed, and with a kill −9 every few seconds, started again each time, until
nothing is left to do. Then every prompt must have one line and one folder, with the undisturbed run's pictures.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from PIL import Image

from sampler import __main__, program  # noqa: F401  before the processes are forked

from .prompts import OPEN


def start(file: Path, out: Path) -> int:
    """The program as a process of its own, painting what is missing in `out` → its number. It is forked: without the
    seconds that imports take, more of the time between two kills is painted in."""
    process = os.fork()
    if not process:
        sys.argv = ["sampler", "--prompts", str(file), "--model", "tiny-turbo", "--images", "2", "--steps", "1",
                    "--no-compare", "--out", str(out)]
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(__main__.main())
    return process


def lines(out: Path) -> bytes:
    file = out / "results.jsonl"
    return file.read_bytes() if file.exists() else b""


def paint_with_kills(file: Path, out: Path, every: float) -> tuple[int, int]:
    """Kills at random moments, every so many seconds on average → kills, and lines cut by one."""
    kills = cut = 0
    while True:
        process, end, status = start(file, out), time.monotonic() + random.uniform(0, 2 * every), None
        while time.monotonic() < end and not (status := os.waitpid(process, os.WNOHANG))[0]:
            time.sleep(0.01)
        if status and status[0]:
            if status[1]:
                raise SystemExit(f"the program ended with {status[1]}")
            return kills, cut
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills, cut = kills + 1, cut + (not (lines(out) or b"\n").endswith(b"\n"))
        print(f"\r{kills} kills", end="", file=sys.stderr)


def pictures(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between kills (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/survive"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    file, whole, killed = args.out / "prompts.jsonl", args.out / "whole", args.out / "killed"
    asked = [{"prompt": OPEN[i % len(OPEN)], "seed": i} for i in range(args.prompts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")

    kills, cut = paint_with_kills(file, killed, args.every)
    begun = time.perf_counter()
    if os.waitpid(start(file, whole), 0)[1]:
        raise SystemExit("the undisturbed run failed")
    seconds = time.perf_counter() - begun
    found = [json.loads(line)["folder"] for line in lines(killed).splitlines()]
    folders = sorted(folder.name for folder in whole.iterdir() if folder.is_dir())
    other = [name for name in folders if pictures(whole / name) != pictures(killed / name)]
    left = sorted(path.name for path in killed.iterdir() if path.name not in (*folders, "results.jsonl"))
    print(f"\n{kills} kills, {cut} of them within a line; undisturbed {seconds:.0f} s\n"
          f"{len(found)} lines for {args.prompts} prompts, {len(set(found))} different; folders with other pictures: "
          f"{len(other)}; left behind: {left or 'nothing'}")
    sys.exit(sorted(found) != folders or len(folders) != args.prompts or bool(other or left))


if __name__ == "__main__":
    main()
