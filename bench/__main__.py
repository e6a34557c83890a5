"""equilax beside every alternative, at equal true error: `python -m bench`.

For each workload and contender: the coarsest tolerances with which the solutions of all
samples and the gradient are good enough, then the times with these, in turns in one
process. TorchDEQ runs in a process of its own, given `--torch PYTHON`, and takes turns
as well. See `bench/README.md` for how to install the others.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
from threadpoolctl import threadpool_limits

from .compare import plot, report
from .compare.libraries import versions
from .compare.run import run
from .compare.workloads import all_workloads
from .timing import describe


KEPT = Path(__file__).with_name("results.json")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("workloads", nargs="*", help="their names [all]")
    add("--small", action="store_true", help="tiny ones, to see that all works")
    add("--repeats", type=int, default=21, help="rounds at most [21]")
    add("--torch", metavar="PYTHON", help="an interpreter that has TorchDEQ")
    add("--json", type=Path, help="write the results; those of a run before are kept")
    add("--plot", type=Path, help="write a picture")
    add("--check", action="store_true", help=f"compare with {KEPT.name}, 1 if slower")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    jax.config.update("jax_enable_x64", False)
    workloads = all_workloads(args.small)
    if unknown := set(args.workloads) - set(workloads):
        sys.exit(f"unknown {', '.join(unknown)}; there are {', '.join(workloads)}")
    results: report.Results = {"workloads": {}}
    if args.json is not None and args.json.exists():
        results = json.loads(args.json.read_text())
    results["where"] = describe()
    results["versions"] = versions()
    for name in args.workloads or workloads:
        # Threads of SciPy's BLAS that wait for work keep the cores from the others.
        with threadpool_limits(1, "blas"):
            found = run(workloads[name](), repeats=args.repeats, torch=args.torch)
        results["workloads"][name] = found
        print(report.details(name, found), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{results['where']}; {results['versions']}")
    for kind, title in (("both", "solution and gradient"), ("forward", "solution")):
        print(f"\n{title}\n\n{report.summary(results, kind)}\n")
        means = report.means(results, kind).items()
        print("geometric means: ", ", ".join(f"{k} {v:.1f}" for k, v in means))
    if args.plot is not None:
        plot.plot(args.plot, results)
    if args.check:
        slower = report.regressions(results, json.loads(KEPT.read_text()))
        print("\n".join(slower) or "Nothing has become slower.")
        sys.exit(bool(slower))


if __name__ == "__main__":
    main()
