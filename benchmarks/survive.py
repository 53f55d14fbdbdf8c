"""Does `--prompts` lose or double a group when it is killed? `python -m benchmarks.survive [--prompts 1000]`.

Paints groups with tiny-turbo twice: undisturbed, and with a kill −9 every few seconds, started again each time, until
nothing is left to do. Then every prompt must have one line and one folder, with the undisturbed run's pictures.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from .prompts import OPEN


def start(file: Path, out: Path) -> subprocess.Popen:
    """The program, painting what is missing in `out`."""
    command = [sys.executable, "-m", "sampler", "--prompts", file, "--model", "tiny-turbo", "--images", "2",
               "--no-compare", "--out", out]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def lines(out: Path) -> bytes:
    file = out / "results.jsonl"
    return file.read_bytes() if file.exists() else b""


def paint_with_kills(file: Path, out: Path, every: float) -> tuple[int, int]:
    """Kills at random moments, `every` seconds after the first new line on average → kills, and lines cut by one."""
    kills = cut = 0
    while True:
        process, before, limit = start(file, out), lines(out).count(b"\n"), random.uniform(0, 2 * every)
        while process.poll() is None and lines(out).count(b"\n") == before:
            time.sleep(0.05)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills, cut = kills + 1, cut + (not lines(out).endswith(b"\n"))
            print(f"\r{kills} kills, {before} groups before the last", end="", file=sys.stderr)
        else:
            if process.returncode == 0:
                return kills, cut
            raise SystemExit(f"the program ended with {process.returncode}")


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
    if start(file, whole).wait():
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
