"""The paper's experiments on the bundled checkpoints: `python -m benchmarks.paper [--quick]`.

Paints groups of pictures with every method, strength and checkpoint, measures them, and writes tables and figures.
A run that is stopped goes on where it was: no finished group is painted again.
"""

import argparse
import json
import sys
from pathlib import Path

from weights import BUNDLED

from .plan import REGIMES, finalists, in_first_round, jobs
from .run import COST_RUNS, costs, finished, run
from .tables import Results, finalist_settings, report

FULL, QUICK = Path("benchmarks/results/paper"), Path("outputs/paper-quick")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four prompts, three settings a method: ten minutes")
    parser.add_argument("--models", nargs="+", choices=REGIMES, default=[m for m in REGIMES if m in BUNDLED])
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder for results (default: {FULL}, with --quick {QUICK})")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is there; paint no group")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    folder = args.out or (QUICK if args.quick else FULL)
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
    """Both rounds, then what each method costs in time."""
    for model in args.models:
        run(jobs([model], args.quick), groups, args.workers, model)
        if not args.quick:
            best = finalist_settings(Results(filter(in_first_round, finished(groups))), [model])
            run(finalists(best), groups, args.workers, f"{model}, second round")
    known = json.loads(cost.read_text()) if cost.exists() else []
    for model in args.models:
        if all(row["model"] != model for row in known):
            known += costs(model, runs=3 if args.quick else COST_RUNS)
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
