"""The paper's experiments on the bundled checkpoints: `python -m benchmarks.paper [--small | --quick]`.

Paints groups of pictures with a few settings of every method, chooses among these for 1, 2 and 3 points of lost
adherence, paints what was chosen on other prompts, measures all, and writes tables and figures. A run that is stopped
goes on where it was: no finished group is painted again.
"""

import argparse
import json
import sys
from pathlib import Path

from sampler.parts import usable_device
from weights import BUNDLED

from .plan import REGIMES, SIZES, stages
from .results import Results
from .run import COST_RUNS, costs, finished, painter, stale
from .tables import report

RESULTS = Path("benchmarks/results/paper")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", dest="size", action="store_const", const="small", default="full",
                      help="three settings a method, fewer prompts: half an hour on two cores")
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="two prompts: under 10 minutes")
    parser.add_argument("--models", nargs="+", choices=REGIMES, default=[m for m in REGIMES if m in BUNDLED])
    parser.add_argument("--device", default="cpu", help="where pictures are painted, in float32 (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop painting after so long; the same command goes on")
    parser.add_argument("--out", type=Path, help=f"folder for results (default: {RESULTS}, outputs/paper-quick)")
    parser.add_argument("--report", action="store_true", help="tables and figures of what is there; paint no group")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    try:
        usable_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    folder = args.out or (RESULTS if args.size == "full" else Path(f"outputs/paper-{args.size}"))
    groups, cost = folder / "groups.jsonl", folder / "costs.json"
    if old := stale(row for row in finished(groups) if row["model"] in args.models):
        print(f"error: {groups} was painted with other weights or defaults of {', '.join(old)} than are bundled now: "
              "move it away, or give another --out", file=sys.stderr)
        return 2
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
    """The groups, stage by stage, then on the CPU what each chosen setting costs in time."""
    with painter(groups, args.workers, args.device, args.minutes) as paint:
        def finalists(model: str, method: str) -> list[dict]:
            return Results(row for row in paint.rows if row["model"] == model).finalists(model, method)
        for label, jobs in stages(args.models, SIZES[args.size], finalists):
            if not paint(jobs, label):
                print("the time is up: the same command goes on", file=sys.stderr)
                return
        rows = paint.rows
    if args.device != "cpu":
        return
    known, results = json.loads(cost.read_text()) if cost.exists() else [], Results(rows)
    for model in args.models:
        measured = [row["setting"] for row in known if row["model"] == model]
        todo = [one.setting for one in results.ranked(model).values() if one.setting not in measured]
        known += costs(model, todo, runs={"full": COST_RUNS, "small": 3, "quick": 1}[args.size])
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
