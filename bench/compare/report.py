"""Results as a table, as a picture's numbers, and against those of an earlier run."""

import math
from typing import Any


Results = dict[str, Any]
OURS = "equilax"
LIBRARIES = (
    *("by hand", "unrolled", "Optimistix", "JAXopt", "banax", "anchorax"),
    *("TorchDEQ", "SciPy"),
)
# What two runs on a shared machine differ by, and more.
_SLACK = 1.3


def best(workload: Results, library: str, kind: str) -> dict[str, Any] | None:
    """The quickest variant of a library, with its name; `None` if none can."""
    rows = [
        {**entry, "name": row}
        for row, entry in workload["rows"].items()
        if entry["library"] == library and entry[kind] is not None
    ]
    return min(rows, key=lambda e: e[kind], default=None)


def best_peer(workload: Results, kind: str) -> dict[str, Any] | None:
    found = [best(workload, library, kind) for library in LIBRARIES]
    return min((e for e in found if e), key=lambda e: e[kind], default=None)


def ratio(workload: Results, library: str, kind: str) -> float | None:
    """How many times as long as ours the best of a library takes."""
    ours, other = best(workload, OURS, kind), best(workload, library, kind)
    return None if ours is None or other is None else other[kind] / ours[kind]


def geometric_mean(numbers: list[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers)) if numbers else math.nan


def _reason(workload: Results, library: str) -> str:
    rows = [e for e in workload["rows"].values() if e["library"] == library]
    reasons = dict.fromkeys(e["reason"] for e in rows if e["reason"])
    return next(iter(reasons), "not run")


def summary(results: Results, kind: str) -> str:
    """A row a workload: ours in milliseconds, others as multiples of it."""
    head = ["workload", "equilax, ms", *LIBRARIES, "best other", "of the floor"]
    lines = [head, ["---"] * len(head)]
    for name, workload in results["workloads"].items():
        ours, peer = best(workload, OURS, kind), best_peer(workload, kind)
        ratios = [ratio(workload, library, kind) for library in LIBRARIES]
        cells = ["-" if r is None else f"{r:.1f}" for r in ratios]
        time = "-" if ours is None else f"{ours[kind]:.2f}"
        least = "-"
        if ours and peer:
            least = f"**{peer[kind] / ours[kind]:.1f}** ({peer['library']})"
        forward = best(workload, OURS, "forward")
        floor = f"{forward['forward'] / workload['floor']:.2f}" if forward else "-"
        lines.append([name, time, *cells, least, floor])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(results: Results, kind: str) -> dict[str, float]:
    """The geometric mean over the workloads that a library can do, for each."""
    found = {}
    for library in LIBRARIES:
        ratios = [ratio(w, library, kind) for w in results["workloads"].values()]
        found[library] = geometric_mean([r for r in ratios if r is not None])
    return found


def details(name: str, workload: Results) -> str:
    """Every contender on one workload."""
    head = (
        *("contender", "forward ms", "with gradient ms", "evaluations", "MiB"),
        *("compile s", "error", "of the gradient", "tolerances"),
    )
    lines = [f"\n### {name}: {workload['what']}\n", _line(head), _line(["---"] * 9)]
    number = lambda x, form: "-" if x is None else format(x, form)
    for row, e in workload["rows"].items():
        if e["forward"] is None:
            lines.append(_line([row, e["reason"], *["-"] * 7]))
            continue
        memory = None if e["memory"] is None else e["memory"] / 2**20
        cells = [
            row,
            number(e["forward"], ".2f"),
            number(e["both"], ".2f") if e["both"] else e["reason"],
            number(e["evaluations"], ".1f"),
            number(memory, ".1f"),
            number(e["compile_seconds"], ".1f"),
            number(e["value_error"], ".0e"),
            number(e["gradient_error"], ".0e"),
            ", ".join(f"{t:.0e}" for t in dict.fromkeys(e["tolerances"])),
        ]
        lines.append(_line(cells))
    floor = f"{workload['floor']:.2f} ms for {workload['floor_evaluations']:.1f}"
    lines.append(f"\nThe floor: {floor} evaluations in a row.")
    return "\n".join(lines)


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def regressions(new: Results, old: Results) -> list[str]:
    """What has become slower than it was, by others in the same run as a clock."""
    found = []
    for name, workload in new["workloads"].items():
        if name not in old["workloads"]:
            continue
        before = old["workloads"][name]
        for kind in ("forward", "both"):
            for library in LIBRARIES:
                now, then = (ratio(w, library, kind) for w in (workload, before))
                if now and then and now * _SLACK < then:
                    found.append(
                        f"{name}, {kind}: {library} took {then:.2f} times as long as "
                        f"equilax, and now {now:.2f} times"
                    )
    return found
