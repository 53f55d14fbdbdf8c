"""The paper's experiments on the bundled checkpoints: `python -m benchmarks.paper [--small | --quick]`.

Paints groups of pictures with every method, strength and checkpoint, measures them, and writes tables and figures.
A run that is stopped goes on where it was: no finished group is painted again.
"""

import argparse
import json
import sys
from pathlib import Path

from weights import BUNDLED

from .plan import REGIMES, SIZES, jobs
from .run import COST_RUNS, costs, finished, run
from .tables import Results, report

RESULTS, QUICK = Path("benchmarks/results/paper"), Path("outputs/paper-quick")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", dest="size", action="store_const", const="small", default="full",
                      help="three settings a method, fewer prompts: 25 minutes; the full run goes on from it")
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="four prompts: five minutes")
    parser.add_argument("--models", nargs="+", choices=REGIMES, default=[m for m in REGIMES if m in BUNDLED])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder for results (default: {RESULTS}, with --quick {QUICK})")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is there; paint no group")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    folder = args.out or (QUICK if args.size == "quick" else RESULTS)
    groups, cost = folder / "groups.jsonl", folder / "costs.json"
    try:
        if not args.report:
            paint_all(args, groups, cost)
        rows = [row for row in finished(groups) if row["model"] in args.models]
        if not rows:
            print(f"error: {groups} holds no group of {', '.join(args.models)}: run without --report", file=sys.stderr)
            return 2
        text = report(rows, json.loads(cost.read_text()) if cost.exists() else [])
        (folder / "tables.md").write_text(text, encoding="utf-8")
        print(text)
        draw(rows, args.models, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the groups in {groups} are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


def paint_all(args: argparse.Namespace, groups: Path, cost: Path) -> None:
    """The groups, then what each method costs in time."""
    for model in args.models:
        run(jobs([model], SIZES[args.size]), groups, args.workers, model)
    known = json.loads(cost.read_text()) if cost.exists() else []
    for model in args.models:
        if all(row["model"] != model for row in known):
            known += costs(model, runs=3 if args.size == "quick" else COST_RUNS)
            cost.write_text(json.dumps(known, indent=1) + "\n")


def draw(rows: list[dict], models: list[str], folder: Path) -> None:
    try:
        from .figures import all_figures
    except ModuleNotFoundError as error:
        print(f"no figures: {error.name} is missing, pip install -c constraints.txt -e '.[bench]'", file=sys.stderr)
        return
    all_figures(Results(rows), models, folder)


if __name__ == "__main__":
    sys.exit(main())
