"""All that one GPU is asked, in one run of under eight minutes.

    PYTHONPATH=src:kernels python -m bench.gpu --json gpu.json

Kernels: right, against XLA's loops, of the roofline, by block sizes. The workloads of
`python -m bench` from the uniform to the convolutional one, against what is installed
of Optimistix, PyTorch and TorchDEQ. Needs jax, equinox, lineax and jaxtyping alone.
What is found is written after each row, so that a run that is cut short has told what
it knew. `--small` is for a look without a GPU.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equilax as eqlx
import jax

from .compare import report
from .compare.libraries import versions
from .gpu_kernels import block_sizes, correctness, layers, rooflines, TOLERANCE
from .gpu_workloads import workloads


# The second by which each section ends; what one leaves the next ones have.
_SECTIONS: dict[Callable[[bool], Iterator[dict]], float] = {
    correctness: 80.0,
    rooflines: 120.0,
    workloads: 330.0,
    layers: 410.0,
    block_sizes: 450.0,
}


def _parse() -> argparse.Namespace:
    summary, _ = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    names = [section.__name__ for section in _SECTIONS]
    add("sections", nargs="*", help=f"of {', '.join(names)} [all]")
    add("--json", type=Path, default=Path("gpu.json"), help="[gpu.json]")
    add("--small", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(names):
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(names)}")
    return args


def _show(row: dict[str, Any]) -> str:
    """A line: of a workload no more than the ratios."""
    shown = {k: v for k, v in row.items() if k not in ("rows", "what")}
    return json.dumps(shown)


def _run(args: argparse.Namespace, found: dict[str, Any], start: float) -> None:
    for section, end in _SECTIONS.items():
        name = section.__name__
        if args.sections and name not in args.sections:
            continue
        rows = found[name] = []
        found["unfinished"].append(name)
        try:
            for row in section(args.small):
                rows.append(row)
                print(name, _show(row), flush=True)
                found["seconds"] = round(time.perf_counter() - start, 1)
                args.json.write_text(json.dumps(found, indent=1) + "\n")
                if found["seconds"] > end:
                    print(f"{name}: stopped after {found['seconds']} s.", flush=True)
                    break
            else:
                found["unfinished"].remove(name)
        except Exception as error:  # The others are still to be told.
            found["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            print(name, found["errors"][name], flush=True)


def main() -> None:
    args = _parse()
    device, start = jax.devices()[0], time.perf_counter()
    if device.platform != "gpu" and not args.small:
        raise SystemExit(f"There is no GPU here, but {device.device_kind}: `--small`?")
    found: dict[str, Any] = {
        "card": device.device_kind,
        "versions": {"equilax": eqlx.__version__, **versions()},
        "tolerance": TOLERANCE,
        "unfinished": [],
        "errors": {},
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    _run(args, found, start)
    found["seconds"] = round(time.perf_counter() - start, 1)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    table = {row["workload"]: row for row in found.get("workloads", [])}
    for kind in ("both", "forward") if table else ():
        print(f"\n{report.TITLES[kind]}\n\n{report.summary(table, kind)}")
    print(f"\n{found['seconds']} s; unfinished: {found['unfinished'] or 'none'}")
    print(f"errors: {found['errors'] or 'none'}; see {args.json}.")


if __name__ == "__main__":
    # PyTorch has its share of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
