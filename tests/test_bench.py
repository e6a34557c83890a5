"""The truth that the benchmarks measure errors against, what they count and report."""

import functools as ft
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench import gpu, timing
from bench.compare import (
    count,
    digits,
    floor,
    growth,
    guard,
    report,
    science,
    workloads,
)
from bench.compare.contender import Contender
from bench.compare.measure import Compiled, fit
from bench.compare.ours import by_hand
from bench.compare.outside import SciPy
from bench.compare.torch_peer import TorchPeer
from bench.compare.workload import Workload
from jax import lax


_ROOT = Path(__file__).parents[1]


def _loss(work: Workload, params, xs):
    """By the plain iteration in float64, 3,000 steps of it."""
    params = jax.tree.map(jnp.asarray, params)
    xs = jnp.asarray(xs)
    step = lambda _, zs: work.whole(zs, (params, xs))
    return work.loss(jax.lax.fori_loop(0, 3000, step, work.starts(xs.dtype)), params)


@pytest.mark.parametrize("name", ["ragged, log-normal", "transformer"])
def test_the_gradient_of_a_workload_is_that_of_finite_differences(name):
    work = workloads.all_workloads(small=True)[name]()
    rng = np.random.default_rng(0)
    loss = jax.jit(lambda params, xs: _loss(work, params, xs))
    *of_params, of_inputs = work.truth[1]
    leaves, structure = jax.tree.flatten(work.params)
    steps = [1e-6 * rng.normal(size=np.shape(leaf)) for leaf in leaves]
    ends = [
        jax.tree.unflatten(structure, [a + s * b for a, b in zip(leaves, steps)])  # noqa: B905
        for s in (1, -1)
    ]
    difference = loss(ends[0], work.xs) - loss(ends[1], work.xs)
    expected = 2 * sum(np.sum(g * s) for g, s in zip(of_params, steps, strict=True))
    assert abs(difference - expected) < 1e-6 * abs(expected) + 1e-12
    step = 1e-6 * rng.normal(size=work.xs.shape)
    difference = loss(work.params, work.xs + step) - loss(work.params, work.xs - step)
    expected = 2 * np.sum(of_inputs * step)
    assert abs(difference - expected) < 1e-6 * abs(expected) + 1e-12


def test_errors_are_those_of_the_worst_sample_and_of_the_worse_gradient():
    work = workloads.all_workloads(small=True)["notebook x 1024"]()
    zs, grads = np.array(work.truth[0]), [np.array(g) for g in work.truth[1]]
    assert work.value_error(zs) == 0
    zs[3] *= 1.5
    assert abs(work.value_error(zs) - 0.5) < 1e-12
    zs[4, 0] = np.nan
    assert work.value_error(zs) == np.inf
    assert work.gradient_error(tuple(grads)) == 0
    assert abs(work.gradient_error((1.25 * grads[0], 1.5 * grads[1])) - 0.5) < 1e-12


@pytest.mark.parametrize("name", ["kepler", "complex"])
def test_the_gradient_of_a_problem_is_that_of_finite_differences(name):
    work = science.all_problems(small=False)[f"problem: {name}"]()
    rng = np.random.default_rng(0)

    def change(x):
        step = 1e-6 * rng.normal(size=np.shape(x))
        if np.iscomplexobj(x):
            step = step + 1e-6j * rng.normal(size=np.shape(x))
        return step

    @jax.jit
    def loss(params):
        step = lambda _, z: work.whole(z, (params, ()))
        return work.loss(lax.fori_loop(0, 500, step, work.starts()), params)

    leaves, structure = jax.tree.flatten(work.params)
    steps = [change(leaf) for leaf in leaves]
    up, down = (
        structure.unflatten([a + s * b for a, b in zip(leaves, steps, strict=True)])
        for s in (1, -1)
    )
    # JAX's convention: the change is the real part of the product.
    pairs = zip(work.truth[1], steps, strict=True)
    expected = 2 * sum(np.sum(np.real(g * step)) for g, step in pairs)
    assert abs(loss(up) - loss(down) - expected) < 1e-6 * abs(expected)


def test_the_gradient_of_a_training_step_reaches_the_readout_and_the_layer():
    work = digits.digits(small=True)
    args = work.arrays(np.float64)
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(args[0])
    steps = [1e-5 * rng.normal(size=leaf.shape) for leaf in leaves]

    @jax.jit
    def loss(params):
        step = lambda _, zs: work.whole(zs, (params, args[1]))
        return work.loss(lax.fori_loop(0, 1500, step, work.starts(np.float64)), params)

    # Each by itself: the weight, the injection, the bias, and those of the readout.
    for i, (leaf, step) in enumerate(zip(leaves, steps, strict=True)):
        up, down = (
            structure.unflatten([*leaves[:i], leaf + s * step, *leaves[i + 1 :]])
            for s in (1, -1)
        )
        expected = 2 * np.sum(work.truth[1][i] * step)
        assert abs(loss(up) - loss(down) - expected) < 1e-5 * abs(expected)


def test_what_nothing_depends_on_has_no_gradient():
    problems = science.all_problems(small=True)
    assert not problems["problem: cosine"]().has_gradient
    assert not problems["problem: mixed_tree"]().has_gradient
    assert problems["problem: complex"]().has_gradient


def test_a_slow_case_has_three_rounds_and_the_others_go_on():
    calls = {"quick": 0, "slow": 0}

    def call(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    cases = {k: ft.partial(call, k, t) for k, t in (("quick", 0.0), ("slow", 0.2))}
    found = timing.compare(cases, repeats=50, title="", most_seconds=1.0)
    assert calls == {"quick": 51, "slow": 4}
    assert found["slow"] >= 200 > found["quick"]


def test_evaluations_and_transposed_products_are_counted_for_each_sample():
    *_, unrolled = by_hand()
    work = workloads.all_workloads(small=True)["uniform"]()
    with work.precision():
        compiled = Compiled(unrolled, work)
        assert count.evaluations(compiled, (1.0, 1.0)) == 30
        assert count.products(compiled, (1.0, 1.0)) == 30
    work = science.all_problems(small=True)["problem: mixed_tree"]()
    with work.precision():
        assert count.evaluations(Compiled(unrolled, work), (1.0, 1.0)) == 30


def test_the_floor_does_no_more_and_no_less_than_is_asked():
    work = workloads.all_workloads(small=True)["uniform"]()
    w, xs = work.params, work.xs
    zs = np.zeros_like(xs)
    for _ in range(4):
        zs = np.tanh(zs @ w.T + xs)
    us, slopes = work.cts, 1 - np.tanh(zs @ w.T + xs) ** 2
    for _ in range(3):
        us = (us * slopes) @ w + work.cts
    with work.precision():
        runs = floor.forward(work, 3.2), floor.both(work, 3.2, 2.7)
        got = [np.asarray(run(), np.float64) for run in runs]
        found = floor.cost(work)
    scale = 50 * np.finfo(np.float32).eps
    assert np.max(np.abs(got[0] - zs)) < scale
    assert np.max(np.abs(got[1] - us)) < scale * np.max(np.abs(us))
    size, batch = w.shape[0], len(xs)
    products = 2 * size * size * batch  # And an addition for each number of the state.
    assert products <= found["operations"] <= products + 4 * size * batch
    assert found["bytes"] >= 4 * (size * size + 3 * size * batch)


def _no_gradient(fn, forward, backward, max_steps):
    del backward, max_steps
    apart = lambda carry: jnp.max(jnp.abs(carry[0] - carry[1])) > forward
    return lambda z0, args: lax.while_loop(
        apart, lambda carry: (fn(carry[0], args), carry[0]), (z0, z0 + 1)
    )[0]


def test_what_has_no_gradient_is_told_why_and_keeps_its_solutions():
    work = workloads.all_workloads(small=True)["notebook"]()
    with work.precision():
        entry = fit(Compiled(Contender("theirs", "loop", _no_gradient), work))
    assert entry.tolerances is not None
    assert entry.value_error is not None
    assert entry.value_error <= work.target
    assert entry.gradient_error is None
    assert entry.reason.startswith("ValueError: Reverse-mode differentiation")


def test_what_takes_too_long_for_one_solve_is_told_and_not_timed(monkeypatch):
    work = workloads.all_workloads(small=True)["notebook"]()
    with work.precision():
        assert SciPy(work, "anderson").fit().tolerances is not None
        monkeypatch.setattr("bench.compare.contender.MOST_SECONDS", 0.0)
        slow = SciPy(work, "anderson")
        entry = slow.fit()
        inside = fit(Compiled(by_hand()[0], work))
    assert entry.reason.endswith(" s: not timed")
    assert inside.reason.endswith(" s: not timed")
    assert inside.tolerances is None
    assert slow.cases(entry) == {}


def test_what_takes_more_memory_than_there_is_is_told_and_not_run(monkeypatch):
    work = workloads.all_workloads(small=True)["notebook"]()
    compiled = Compiled(by_hand()[0], work)
    page = os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: page if "SIZE" in name else 0)
    with work.precision():
        entry = fit(compiled)
    assert entry.tolerances is None
    assert entry.reason.startswith("MemoryError: ")


@pytest.mark.parametrize("quickest", [1, 4])
def test_pytorch_has_the_quicker_number_of_threads(quickest, monkeypatch):
    work = workloads.all_workloads(small=True)["notebook"]()
    asked = []

    def ask(what, *numbers):
        asked.append((what, *numbers))
        threads = [n for w, *n in asked if w == "threads"][-1][0]
        if what == "both":
            time.sleep(0.001 if threads == quickest else 0.01)

    peer = TorchPeer(work, "anderson", "python")
    monkeypatch.setattr(peer, "ask", ask)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert peer._choose_threads((1e-4, 1e-4)) == quickest
    assert asked[-1] == ("threads", quickest)
    peer.close()


def _entry(library, forward, both):
    return {
        "library": library,
        "forward": forward,
        "both": both,
        "evaluations": 10.0,
        "reason": "" if both else "no gradients",
    }


def _results(theirs):
    rows = {
        "equilax, a": _entry("equilax", 2.0, 5.0),
        "equilax, b": _entry("equilax", 1.0, 6.0),
        "JAXopt, a": _entry("JAXopt", 3.0, theirs),
        "SciPy, a": _entry("SciPy", 8.0, None),
    }
    least = {"forward": 0.5, "both": 1.0, "operations": 3e6, "bytes": 2e6}
    least |= {"evaluations": 8.0, "evaluations and products": [10.0, 9.0]}
    return {"w": {"what": "w", "floor": least, "rows": rows}}


def test_a_ratio_is_of_the_best_of_each():
    results = _results(20.0)
    work = results["w"]
    assert report.ratio(work, "JAXopt", "both") == 4
    assert report.ratio(work, "JAXopt", "forward") == 3
    assert report.ratio(work, "SciPy", "forward") == 8
    assert report.ratio(work, "SciPy", "both") is None
    peer = report.best_peer(work, "both")
    assert peer is not None
    assert peer["name"] == "JAXopt, a"
    # SciPy, which has no gradient anywhere, has no column.
    row = report.summary(results, "both").splitlines()[-1]
    assert row == "| w | 5.00 | 4.0 | **4.0** (JAXopt) | 5.00 |"
    row = report.summary(results, "forward").splitlines()[-1]
    assert row == "| w | 1.00 | 3.0 | 8.0 | **3.0** (JAXopt) | 2.00 |"


def test_means_are_geometric_and_of_the_best_other_too():
    assert abs(report.geometric_mean([2.0, 8.0]) - 4) < 1e-12
    results = _results(5.0) | {"v": _results(20.0)["w"]}
    assert report.means(results, "both") == pytest.approx(
        {"JAXopt": 2.0, "best other": 2.0}
    )
    assert report.means(results, "forward") == pytest.approx(
        {"JAXopt": 3.0, "SciPy": 8.0, "best other": 3.0}
    )


def test_what_each_can_do_is_counted_and_the_floor_is_a_share():
    other = _results(5.0) | {"v": _results(20.0)["w"]}
    rows = report.abilities(other).splitlines()
    assert rows[0].startswith("| library | solution: of 2 |")
    assert "| JAXopt | 2 | 3.0 | 2 | 2.0 |" in rows  # The mean of 1 and 4.
    assert "| SciPy | 2 | 8.0 | 0 | - |" in rows
    # 10 evaluations of 3e6 operations and 2e6 bytes in a millisecond.
    row = report.floors(_results(20.0)).splitlines()[-1]
    assert row == "| w | 8.0 | 9.0 | 3 | 2 | 30 | 20 | 50% | 20% |"


def _kept(theirs, processor="one"):
    return {"workloads": _results(theirs), "machine": {"processor": processor}}


def test_a_regression_is_a_ratio_that_has_fallen():
    assert guard.regressions(_kept(20.0), _kept(20.0)) == []
    assert guard.regressions(_kept(16.0), _kept(20.0)) == []
    (line,) = guard.regressions(_kept(10.0), _kept(20.0))
    assert (
        line == "w, both: JAXopt took 4.00 times as long as equilax, and now 2.00 times"
    )


def test_a_regression_fails_on_the_machine_of_the_kept_run_alone():
    kept = Path("kept.json")
    text, is_failure = guard.judge(_kept(10.0), _kept(20.0), kept)
    assert is_failure
    assert "other" not in text
    text, is_failure = guard.judge(_kept(10.0, "another"), _kept(20.0), kept)
    assert not is_failure
    assert "now 2.00 times" in text
    assert "processor: one, now another" in text
    assert guard.judge(_kept(20.0), _kept(20.0), kept) == (
        "Nothing has become slower.",
        False,
    )
    text, is_failure = guard.judge(_kept(20.0), None, kept)
    assert not is_failure
    assert "no kept.json" in text


def test_the_details_that_are_shown_are_of_the_results_that_are_kept():
    kept = json.loads((_ROOT / "bench/results.json").read_text())
    assert (_ROOT / "bench/details.md").read_text() == report.all_details(kept)


@pytest.mark.parametrize("page", ["README.md", "bench/README.md"])
def test_the_tables_that_are_shown_are_of_the_results_that_are_kept(page):
    kept = json.loads((_ROOT / "bench/results.json").read_text())
    assert list(kept["workloads"]) == list(workloads.all_workloads(small=True))
    measured = kept["workloads"]
    shown = [report.summary(measured, "both")]
    if page == "bench/README.md":
        shown += [report.summary(measured, "forward"), report.floors(measured)]
        shown += [report.summary(kept["training"], "step")]
        shown += [report.abilities(kept["problems"]), growth.table(kept["growth"])]
    text = (_ROOT / page).read_text()
    assert [table for table in shown if table not in text] == []


def test_a_section_that_fails_or_is_late_leaves_the_others(tmp_path, monkeypatch):
    def early(small):
        assert small
        yield {"row": 1}
        raise ValueError("broken")

    def late(small):
        yield {"row": small}
        yield {"row": 2}

    def last(small):
        yield {"row": small}

    path = tmp_path / "gpu.json"
    sections = {early: 1e6, late: -1.0, last: 1e6}
    monkeypatch.setattr(gpu, "_SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--json", str(path)])
    gpu.main()
    found = json.loads(path.read_text())
    assert found["early"] == [{"row": 1}]
    assert found["errors"] == {"early": "ValueError: broken"}
    assert found["late"] == [{"row": True}]
    assert found["last"] == [{"row": True}]
    assert found["unfinished"] == ["early", "late"]


def test_the_command_writes_what_it_prints(tmp_path):
    file, plots = tmp_path / "results.json", [tmp_path / f"{i}.png" for i in range(2)]
    command = [sys.executable, "-m", "bench", "notebook", "problem: mixed_tree"]
    command += ["growth", "--small", "--repeats", "1", "--libraries", "by hand,SciPy"]
    command += ["--json", str(file), "--plot", str(plots[0])]
    details = tmp_path / "details.md"
    command += ["--growth-plot", str(plots[1]), "--check", "--details", str(details)]
    ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text())
    assert list(found["workloads"]) == ["notebook"]
    assert list(found["problems"]) == ["problem: mixed_tree"]
    assert [point["x"] for point in found["growth"]] == [1, 8, 2, 10]
    rows = found["problems"]["problem: mixed_tree"]["rows"]
    assert "by hand, two loops, whole batch" not in rows  # One sample has no batch.
    assert rows["by hand, two loops"]["value_error"] <= 1.2e-5
    assert rows["by hand, two loops"]["reason"] == "nothing to differentiate in"
    assert "| by hand | 1 | - | 0 | - |" in ran.stdout
    assert all(path.stat().st_size > 10_000 for path in plots)
    text = details.read_text()
    assert "\n### notebook: " in text
    assert "\n### problem: mixed_tree: " in text
    again = [sys.executable, "-m", "bench", "nothing", "--json", str(file)]
    told = subprocess.run(again, cwd=_ROOT, capture_output=True, text=True)
    assert told.stdout.strip() in ran.stdout
