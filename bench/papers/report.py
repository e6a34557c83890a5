"""What a reproduction has to say, as a table for readers and as JSON for machines."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..timing import describe


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published figure beside ours.

    **Attributes:**

    - `is_met`: Whether ours is within what was published. `None` where that is no
        question of yes or no.
    - `note`: How the two differ, and why.
    """

    what: str
    published: str
    ours: str
    is_met: bool | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A reproduction.

    **Attributes:**

    - `inputs`: All that was put in, seeds included.
    - `tables`: By title, rows of cells, the first of them the head.
    """

    source: str
    inputs: str
    claims: list[Claim]
    tables: dict[str, list[list[str]]] = dataclasses.field(default_factory=dict)


Run = Callable[[Path | None], Report]


@dataclasses.dataclass(frozen=True)
class WithTorch:
    """One that takes the path of an interpreter with another library, too."""

    run: Callable[[Path | None, str | None], Report]


_IS_MET = {True: "yes", False: "no", None: "-"}


def markdown(rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as a table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


_HEAD = ["what", "published", "ours", "met", "where they differ"]


def _cells(claim: Claim) -> list[str]:
    met = _IS_MET[claim.is_met]
    return [claim.what, claim.published, claim.ours, met, claim.note]


def describe_report(report: Report) -> str:
    """All of a report, in Markdown."""
    rows = [_HEAD, *(_cells(claim) for claim in report.claims)]
    parts = [f"{report.source}\n\n{report.inputs}\n", markdown(rows)]
    parts += [f"\n{title}\n\n{markdown(t)}" for title, t in report.tables.items()]
    return "\n".join(parts)


def main(runs: dict[str, Run | WithTorch], description: str | None) -> None:
    """The command line of one reproduction, or of several."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--plots", type=Path, help="the folder for figures")
    parser.add_argument("--json", type=Path, help="where to write all of it as JSON")
    help = "an interpreter that has TorchDEQ, for digits_methods"
    parser.add_argument("--torch", metavar="PYTHON", help=help)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
    print(describe())
    found: dict[str, Any] = {}
    together = [["reproduction", *_HEAD]]
    for name, run in runs.items():
        if isinstance(run, WithTorch):
            report = run.run(options.plots, options.torch)
        else:
            report = run(options.plots)
        found[name] = dataclasses.asdict(report)
        together += [[name, *_cells(claim)] for claim in report.claims]
        print(f"\n## {name}\n\n{describe_report(report)}", flush=True)
    if len(runs) > 1:
        print(f"\n## All of them\n\n{markdown(together)}")
    if options.json is not None:
        whole = {"machine": describe(), "reports": found}
        options.json.write_text(json.dumps(whole, indent=1))
