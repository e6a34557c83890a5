"""equilax beside every alternative, at equal true error: `python -m bench`.

For each workload and contender: the coarsest tolerances with which the solutions of all
samples and the gradient are good enough, then the times with these, in turns in one
process. TorchDEQ runs in a process of its own, given `--torch PYTHON`, and takes turns
as well. See `bench/README.md` for how to install the others.

    python -m bench [main] [problems] [training] [growth] [NAME ...]

`main`: the workloads. `problems`: those of `tests/problems.py`. `training`: a step of
the digits example. `growth`: with samples, unknowns and steps. `nothing`: to print and
plot what `--json` has kept. All without a name.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from threadpoolctl import threadpool_limits

from .compare import digits, growth, growth_plot, guard, plot, report
from .compare.contender import Contender
from .compare.libraries import all_contenders, versions
from .compare.outside import outsiders
from .compare.run import run
from .compare.science import all_problems
from .compare.workload import Workload
from .compare.workloads import all_workloads
from .timing import describe, machine


KEPT = Path(__file__).with_name("results.json")
_GROUPS = {"main": "workloads", "problems": "problems", "training": "training"}
_PARTS = (*_GROUPS, "growth", "nothing")


def _libraries(text: str) -> list[str]:
    known = (report.OURS, *report.LIBRARIES)
    if unknown := set(text.split(",")) - set(known):
        raise argparse.ArgumentTypeError(f"{unknown}; there are {', '.join(known)}")
    return text.split(",")


def _parse() -> argparse.Namespace:
    summary, _ = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("names", nargs="*", help=f"{', '.join(_PARTS)}, or a workload [all]")
    add("--small", action="store_true", help="tiny ones, to see that all works")
    add("--repeats", type=int, default=21, help="rounds at most [21]")
    add("--libraries", type=_libraries, metavar="A,B", help="those to take [all]")
    add("--torch", metavar="PYTHON", help="an interpreter that has TorchDEQ")
    add("--json", type=Path, help="write the results; those of a run before are kept")
    add("--plot", type=Path, help="write a picture")
    add("--growth-plot", type=Path, help="write a picture of growth")
    add("--details", type=Path, help="write a table of all contenders, a workload each")
    add("--check", action="store_true", help=f"compare with {KEPT.name}, 1 if slower")
    return parser.parse_args()


def _workloads(small: bool) -> dict[str, tuple[str, Callable[[], Workload]]]:
    """By name, each with its group."""
    groups = {
        "main": all_workloads(small),
        "problems": all_problems(small),
        "training": {"digits": lambda: digits.digits(small)},
    }
    return {k: (g, make) for g, made in groups.items() for k, make in made.items()}


def _chosen(names: list[str], known: list[str]) -> list[str]:
    if unknown := set(names) - set(known):
        sys.exit(f"unknown {', '.join(unknown)}; there are {', '.join(known)}")
    return names or known


def _contenders(group: str, libraries: list[str] | None) -> list[Contender]:
    found = digits.contenders() if group == "training" else all_contenders()
    return [c for c in found if libraries is None or c.library in libraries]


def _measure(group: str, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    others = outsiders(work, args.torch)
    if args.libraries is not None:
        others = [o for o in others if o.row.split(",")[0] in args.libraries]
    contenders = _contenders(group, args.libraries)
    # There are many problems, and the workloads say how long compilation takes.
    workers = (os.cpu_count() or 1) if group == "problems" else 1
    return run(work, contenders, others, repeats=args.repeats, workers=workers)


def _print(results: dict[str, Any]) -> None:
    print(f"\n{results['where']}; {results['versions']}; threads: {results['threads']}")
    if workloads := results.get("workloads"):
        for kind in ("both", "forward"):
            _print_summary(report.TITLES[kind], workloads, kind)
        print(f"\nthe floor\n\n{report.floors(workloads)}")
    if problems := results.get("problems"):
        print(f"\nproblems\n\n{report.abilities(problems)}")
        for kind in ("both", "forward"):
            print(f"\n{report.TITLES[kind]}\n\n{report.summary(problems, kind)}")
    if training := results.get("training"):
        for kind in ("step", "both", "forward"):
            _print_summary(f"training, {report.TITLES[kind]}", training, kind)
    if points := results.get("growth"):
        print("\ngrowth: with the gradient (solution), memory, compilation\n")
        print(growth.table(points))


def _print_summary(title: str, workloads: dict[str, Any], kind: str) -> None:
    print(f"\n{title}\n\n{report.summary(workloads, kind)}\n")
    means = report.means(workloads, kind).items()
    text = ", ".join(f"{k} {v:.1f}" for k, v in means)
    print(f"geometric means: {text or 'none'}")


def _conditions() -> dict[str, Any]:
    here = machine()
    return {
        "where": describe(),
        "machine": here,
        "versions": versions(),
        # Threads of SciPy's BLAS that wait for work keep the cores from the others.
        "threads": {"XLA": here["cores"], "BLAS": 1},
    }


def main() -> None:
    args = _parse()
    jax.config.update("jax_enable_x64", False)
    workloads = _workloads(args.small)
    chosen = _chosen(args.names, [*_PARTS, *workloads])
    results: report.Results = {}
    if args.json is not None and args.json.exists():
        results = json.loads(args.json.read_text())
    if chosen != ["nothing"]:
        results |= _conditions()
    elif not results:
        sys.exit("`nothing` prints what `--json` has kept, and it has kept nothing")

    def save() -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    with threadpool_limits(1, "blas"):
        for name, (group, make) in workloads.items():
            if name in chosen or group in chosen:
                found = _measure(group, make(), args)
                kept = results.get(_GROUPS[group], {}) | {name: found}
                # In their order, and not in that of the runs.
                results[_GROUPS[group]] = {k: kept[k] for k in workloads if k in kept}
                print(report.details(name, found), flush=True)
                save()
        if "growth" in chosen:
            results["growth"] = []
            options = {"small": args.small, "libraries": args.libraries}
            for point in growth.measure(repeats=args.repeats, **options):
                results["growth"].append(point)
                print(growth.table([point]).splitlines()[-1], flush=True)
                save()
    _print(results)
    if args.plot is not None and "workloads" in results:
        plot.plot(args.plot, results)
    if args.growth_plot is not None and "growth" in results:
        growth_plot.plot(args.growth_plot, results["growth"])
    if args.details is not None:
        args.details.write_text(report.all_details(results))
    if args.check:
        old = json.loads(KEPT.read_text()) if KEPT.exists() else None
        text, is_failure = guard.judge(results, old, KEPT)
        print(f"\n{text}")
        sys.exit(is_failure)


if __name__ == "__main__":
    main()
