"""The truth that the benchmarks measure errors against, and their report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench.compare import report, workloads
from bench.compare.workload import Workload


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


def _entry(library, forward, both):
    return {
        "library": library,
        "forward": forward,
        "both": both,
        "reason": "" if both else "no gradients",
    }


def _results(theirs):
    rows = {
        "equilax, a": _entry("equilax", 2.0, 5.0),
        "equilax, b": _entry("equilax", 1.0, 6.0),
        "JAXopt, a": _entry("JAXopt", 3.0, theirs),
        "SciPy, a": _entry("SciPy", 8.0, None),
    }
    return {"workloads": {"w": {"what": "w", "floor": 0.5, "rows": rows}}}


def test_a_ratio_is_of_the_best_of_each():
    results = _results(20.0)
    work = results["workloads"]["w"]
    assert report.ratio(work, "JAXopt", "both") == 4
    assert report.ratio(work, "JAXopt", "forward") == 3
    assert report.ratio(work, "SciPy", "forward") == 8
    assert report.ratio(work, "SciPy", "both") is None
    peer = report.best_peer(work, "both")
    assert peer is not None
    assert peer["name"] == "JAXopt, a"
    row = report.summary(results, "both").splitlines()[-1]
    assert row.startswith("| w | 5.00 | - | - | - | 4.0 |")
    assert row.endswith("| **4.0** (JAXopt) | 2.00 |")
    assert abs(report.geometric_mean([2.0, 8.0]) - 4) < 1e-12


def test_a_regression_is_a_ratio_that_has_fallen():
    assert report.regressions(_results(20.0), _results(20.0)) == []
    assert report.regressions(_results(16.0), _results(20.0)) == []
    (line,) = report.regressions(_results(10.0), _results(20.0))
    assert (
        line == "w, both: JAXopt took 4.00 times as long as equilax, and now 2.00 times"
    )
