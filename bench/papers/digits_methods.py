"""Ways to the gradient of an equilibrium classifier of digits, beside TorchDEQ.

    python -m bench.papers.digits_methods [--torch PYTHON] [--json FILE]

Implicit gradients, phantom gradients (Geng et al. 2021) and one-step gradients (Fung et
al. 2022), by accuracy and by time, and the evaluations that a penalty on the Jacobian
(Bai, Koltun and Kolter 2021) saves. `PYTHON` is an interpreter that has torch, torchdeq
and scikit-learn; ours and theirs take turns. Without it theirs are not measured.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import equilax as eqlx
import numpy as np
from tqdm import tqdm

from . import digits_split as split
from .digits_equilax import programs, train, Way
from .report import Claim, main, Report, WithTorch


SEEDS, FEW_SEEDS = (0, 1, 2, 3, 4), (0, 1)
PENALTIES = (0.4, 4.0)
# Measured elsewhere with TorchDEQ: the accuracy in per cent, the seconds.
MEASURED = {"implicit": (95.6, 9.8), "phantom": (95.3, 3.7), "one step": (94.5, 3.5)}
_IMAGES = 450
Runs = list[dict[str, float]]


class TorchDEQ:
    """Trainings by TorchDEQ in a process of another interpreter."""

    def __init__(self, python: str):
        path = Path(__file__).with_name("digits_torchdeq.py")
        pipe = subprocess.PIPE
        self._process: Any = subprocess.Popen(
            [python, str(path)], stdin=pipe, stdout=pipe, text=True
        )
        self.versions = self._read()
        self.train("implicit", 0, epochs=1)  # To warm it up.

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            raise RuntimeError(f"`--torch`: TorchDEQ's process ended with {code}.")
        return json.loads(line)

    def train(self, method: str, seed: int, **options) -> dict[str, float]:
        asked = json.dumps({"method": method, "seed": seed, **options})
        self._process.stdin.write(asked + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()


def _jobs() -> dict[str, tuple[Way, tuple[int, ...]]]:
    """What is trained, by the name of its row, and from which seeds."""
    jobs: dict[str, tuple[Way, tuple[int, ...]]]
    jobs = {method: (Way(method), SEEDS) for method in MEASURED}
    jobs["implicit, Anderson"] = Way("implicit", "Anderson"), FEW_SEEDS
    for weight in PENALTIES:
        name = f"implicit, penalty {weight:g}"
        jobs[name] = Way("implicit", penalty=weight), FEW_SEEDS
    return jobs


def _measure(python: str | None) -> tuple[dict[str, Runs], dict[str, Runs], str]:
    """Ours and theirs, by job, taking turns, and the versions of theirs."""
    jobs = _jobs()
    peer = None if python is None else TorchDEQ(python)
    for way, _ in jobs.values():
        programs(way)
    ours: dict[str, Runs] = {name: [] for name in jobs}
    theirs: dict[str, Runs] = {name: [] for name in jobs}
    turns = [(n, w, seed) for seed in SEEDS for n, (w, s) in jobs.items() if seed in s]
    for name, way, seed in tqdm(turns, desc="digits", leave=False):
        ours[name].append(train(way, seed))
        if peer is not None:
            options = {"solver": way.solver, "penalty": way.penalty}
            theirs[name].append(peer.train(way.method, seed, **options))
    versions = "not measured: no `--torch`"
    if peer is not None:
        versions = ", ".join(f"{k} {v}" for k, v in peer.versions.items())
        peer.close()
    # What the default way of batching takes, where one loop is enough.
    staged = Way("implicit", batching=eqlx.Staged())
    ours["implicit, Staged()"] = [train(staged, seed) for seed in FEW_SEEDS]
    theirs["implicit, Staged()"] = []
    jobs["implicit, Staged()"] = staged, FEW_SEEDS
    for name, (way, _) in jobs.items():
        for run in ours[name]:
            run["compilation"], run["compilation cpu"] = (
                programs(way).seconds,
                programs(way).cpu,
            )
    return ours, theirs, versions


def _median(runs: Runs, name: str) -> float:
    return float(np.median([run[name] for run in runs]))


def _accuracy(runs: Runs) -> str:
    if not runs:
        return "not measured"
    values = 100 * np.array([run["accuracy"] for run in runs])
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def _time(runs: Runs) -> str:
    if not runs:
        return "not measured"
    return f"{_median(runs, 'seconds'):.2f} ({_median(runs, 'cpu'):.2f})"


def _claims(ours: dict[str, Runs], theirs: dict[str, Runs]) -> list[Claim]:
    claims = []
    for method, (accuracy, seconds) in MEASURED.items():
        mine, other = ours[method], theirs[method]
        mean = 100 * float(np.mean([run["accuracy"] for run in mine]))
        ratio = "TorchDEQ here: not measured"
        if other:
            times, cpu = (
                _median(other, k) / _median(mine, k) for k in ("seconds", "cpu")
            )
            ratio = f"TorchDEQ here: {_time(other)}, {times:.1f} times ours ({cpu:.1f})"
        claims += [
            Claim(
                f"{method}: accuracy, per cent",
                f"{accuracy} (TorchDEQ)",
                _accuracy(mine),
                abs(mean - accuracy) < 1,
                f"mean and range of seeds; TorchDEQ here: {_accuracy(other)}; met is "
                "within one point, one image is 0.22",
            ),
            Claim(
                f"{method}: seconds of a training (of the processor)",
                f"{seconds} (TorchDEQ)",
                _time(mine),
                None,
                ratio,
            ),
        ]
    plain = _median(ours["implicit"][: len(FEW_SEEDS)], "mean evals")
    for weight in PENALTIES:
        less = 1 - _median(ours[f"implicit, penalty {weight:g}"], "mean evals") / plain
        claims.append(
            Claim(
                f"evaluations saved by a penalty of {weight:g} on the Jacobian",
                "about half, at equal accuracy (other models)",
                f"{less:.0%}",
                None,
                "of held-out images; accuracy "
                + _accuracy(ours[f"implicit, penalty {weight:g}"]),
            )
        )
    return claims


def _row(name: str, whose: str, runs: Runs) -> list[str]:
    compilation = mean = "-"
    if "compilation" in runs[0]:
        compilation = f"{runs[0]['compilation']:.1f} ({runs[0]['compilation cpu']:.1f})"
        mean = f"{_median(runs, 'mean evals'):.0f}"
    worst = f"{_median(runs, 'evals'):.0f}"
    return [name, whose, _accuracy(runs), _time(runs), compilation, worst, mean]


def run(plots: Path | None, python: str | None = None) -> Report:
    del plots
    ours, theirs, versions = _measure(python)
    head = ["way", "library", "accuracy, per cent", "seconds (processor)"]
    table = [[*head, "compilation", "evaluations, worst", "mean"]]
    for name, runs in ours.items():
        table.append(_row(name, "equilax", runs))
        if theirs[name]:
            table.append(_row(name, "TorchDEQ", theirs[name]))
    inputs = (
        f"The digits of scikit-learn, pixels divided by 16, split 75/25 by its seed 0: "
        f"{_IMAGES} held out. {split.UNITS} ReLU units, the weight normalised to a "
        f"spectral norm of {split.NORM} by a power iteration a step; uniform initial "
        f"weights as in PyTorch; Adam {split.RATE}, batches of {split.BATCH}, what is "
        f"left over of an epoch not used, {split.EPOCHS} epochs, float32, seeds 0 to "
        f"{len(SEEDS) - 1} ({len(FEW_SEEDS)} of them in the rows from Anderson on). "
        f"A plain iteration from zero forward and backward, at most {split.MAX_STEPS} "
        f"steps, to a residual of {split.TOLERANCE} of the 2-norm of the state. "
        f"Phantom: {split.TERMS} steps damped by {split.DAMP}. TorchDEQ: {versions}, "
        "one thread. Medians; compilation is not part of the seconds."
    )
    source = "Geng et al. 2021, Fung et al. 2022, Bai et al. 2021; measured elsewhere"
    return Report(source, inputs, _claims(ours, theirs), {"All of it": table})


RUN = WithTorch(run)


if __name__ == "__main__":
    main({"digits_methods": RUN}, __doc__)
