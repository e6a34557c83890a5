"""Results as a table, as a picture's numbers, and against those of an earlier run."""

import math
from typing import Any


Results = dict[str, Any]
OURS = "equilax"
LIBRARIES = (
    *("by hand", "unrolled", "Optimistix", "JAXopt", "banax", "anchorax"),
    *("TorchDEQ", "PyTorch", "SciPy"),
)
TITLES = {
    "both": "solution and gradient",
    "forward": "solution",
    "step": "step of training",
}


def best(workload: Results, library: str, kind: str) -> dict[str, Any] | None:
    """The quickest variant of a library, with its name; `None` if none can."""
    rows = [
        {**entry, "name": row}
        for row, entry in workload["rows"].items()
        if entry["library"] == library and entry.get(kind) is not None
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


def summary(workloads: Results, kind: str) -> str:
    """A row a workload: ours in milliseconds, others as multiples of it.

    Libraries that can do none of them are left out.
    """
    libraries = [k for k in LIBRARIES if ratios(workloads, k, kind)]
    head = ["workload", "equilax, ms", *libraries, "best other", "of the floor"]
    lines = [head, ["---"] * len(head)]
    for name, workload in workloads.items():
        ours, peer = best(workload, OURS, kind), best_peer(workload, kind)
        found = [ratio(workload, library, kind) for library in libraries]
        cells = ["-" if r is None else f"{r:.1f}" for r in found]
        time = "-" if ours is None else f"{ours[kind]:.2f}"
        least = "-"
        if ours and peer:
            least = f"**{peer[kind] / ours[kind]:.1f}** ({peer['library']})"
        floor = workload["floor"].get(kind)
        times = f"{ours[kind] / floor:.2f}" if ours and floor else "-"
        lines.append([name, time, *cells, least, times])
    return "\n".join(map(line, lines))


def ratios(workloads: Results, library: str, kind: str) -> list[float]:
    """Of the workloads that it can do, and that ours can."""
    found = [ratio(w, library, kind) for w in workloads.values()]
    return [r for r in found if r is not None]


def means(workloads: Results, kind: str) -> dict[str, float]:
    """The geometric mean over the workloads that a library can do, for each.

    Of the best other library of each workload too.
    """
    found = {k: ratios(workloads, k, kind) for k in LIBRARIES}
    pairs = [(best(w, OURS, kind), best_peer(w, kind)) for w in workloads.values()]
    found["best other"] = [b[kind] / a[kind] for a, b in pairs if a and b]
    return {k: geometric_mean(numbers) for k, numbers in found.items() if numbers}


def abilities(workloads: Results) -> str:
    """A row a library: how many it can do at all, and the mean ratio on those."""
    possible = {
        kind: [
            w for w in workloads.values() if best(w, OURS, kind) or best_peer(w, kind)
        ]
        for kind in ("forward", "both")
    }
    lines = [["library"], ["---"] * 5]
    for kind, of in possible.items():
        lines[0] += [f"{TITLES[kind]}: of {len(of)}", "times as long as equilax"]
    for library in (OURS, *LIBRARIES):
        cells = [library]
        for kind, of in possible.items():
            num = sum(best(w, library, kind) is not None for w in of)
            mean = geometric_mean(ratios(workloads, library, kind))
            cells += [str(num), "-" if math.isnan(mean) else f"{mean:.1f}"]
        lines.append(cells)
    return "\n".join(map(line, lines))


def details(name: str, workload: Results) -> str:
    """Every contender on one workload."""
    is_training = any(e.get("step") for e in workload["rows"].values())
    head = ["contender", "forward ms", "with gradient ms"]
    head += ["step ms", "MiB of it"] if is_training else []
    head += ["evaluations", "MiB", "compile s", "error", "of the gradient"]
    head += ["tolerances"]
    lines = [f"\n### {name}: {workload['what']}\n", line(head)]
    lines.append(line(["---"] * len(head)))
    for row, e in workload["rows"].items():
        cells = [row, e["reason"]]
        if e["forward"] is not None:
            cells = [row, *_numbers(e, is_training)]
        lines.append(line(cells + ["-"] * (len(head) - len(cells))))
    lines += _remarks(workload)
    return "\n".join(lines)


def all_details(results: Results) -> str:
    groups = [results.get(k, {}) for k in ("workloads", "training", "problems")]
    tables = [details(name, w) for group in groups for name, w in group.items()]
    return "\n".join(["# Every contender", f"\n{results['where']}.", *tables, ""])


def _numbers(e: dict[str, Any], is_training: bool) -> list[str]:
    number = lambda x, form: "-" if x is None else format(x, form)
    mebibytes = lambda x: number(None if x is None else x / 2**20, ".1f")
    step = [number(e["step"], ".2f"), mebibytes(e["step_memory"])]
    return [
        number(e["forward"], ".2f"),
        number(e["both"], ".2f") if e["both"] else e["reason"],
        *(step if is_training else []),
        number(e["evaluations"], ".1f"),
        mebibytes(e["memory"]),
        number(e["compile_seconds"], ".1f"),
        number(e["value_error"], ".0e"),
        number(e["gradient_error"], ".0e"),
        ", ".join(f"{t:.0e}" for t in dict.fromkeys(e["tolerances"])),
    ]


def _remarks(workload: Results) -> list[str]:
    found, floor = [], workload["floor"]
    if floor:
        time = f"{floor['forward']:.2f} ms for {floor['evaluations']:.1f}"
        found.append(f"\nThe floor: {time} evaluations in a row")
        if "both" in floor:
            num = floor["evaluations and products"]
            found[-1] += (
                f", {floor['both']:.2f} ms for {num[0]:.1f} and {num[1]:.1f} products "
                "with the transposed Jacobian"
            )
        found[-1] += "."
    threads = [
        f"{row} {e['threads']}" for row, e in workload["rows"].items() if e["threads"]
    ]
    if threads:
        found.append(f"\nThreads, the quicker of one and all: {', '.join(threads)}.")
    return found


def floors(workloads: Results) -> str:
    """What an evaluation of the batch is, and how near ours comes to doing no more."""
    head = ("workload", "evaluations", "products", "MFLOP each", "MB each")
    head += ("GFLOP/s", "GB/s", "floor / forward", "floor / with gradient")
    lines = [head, ["---"] * len(head)]
    for name, workload in workloads.items():
        forward, floor = best(workload, OURS, "forward"), workload["floor"]
        both = best(workload, OURS, "both")
        if not (floor and forward and forward["evaluations"]):
            continue
        # A million a millisecond is a billion a second.
        rate = forward["evaluations"] / (1e6 * forward["forward"])
        has_both = both and "both" in floor
        lines.append(
            [
                name,
                f"{floor['evaluations']:.1f}",
                f"{floor['evaluations and products'][1]:.1f}" if has_both else "-",
                f"{floor['operations'] / 1e6:.3g}",
                f"{floor['bytes'] / 1e6:.3g}",
                f"{rate * floor['operations']:.3g}",
                f"{rate * floor['bytes']:.3g}",
                f"{floor['forward'] / forward['forward']:.0%}",
                f"{floor['both'] / both['both']:.0%}" if both and has_both else "-",
            ]
        )
    return "\n".join(map(line, lines))


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"
