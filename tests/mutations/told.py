"""Faults in what the library tells of a solve: tolerances, statuses, errors."""

from .mutation import Mutation


_SINGULAR = ("tests/test_reports_dtypes.py", "-k", "rounding_decides or singular")
_MESSAGES = ("tests/test_reports_messages.py",)

TOLD = (
    Mutation(
        "a traced tolerance below zero is reached",
        "src/equilax/_solver/tolerance.py",
        "return jnp.where(tolerance < 0, jnp.nan, tolerance)",
        "return tolerance",
        ("tests/test_status.py", "-k", "below_zero"),
    ),
    Mutation(
        "one that is read is not looked at",
        "src/equilax/_check.py",
        "if is_readable(value) and not value >= 0:",
        "if isinstance(value, float) and not value >= 0:",
        ("tests/test_status.py", "-k", "below_zero"),
    ),
    Mutation(
        "a kernel reaches a tolerance below zero",
        "kernels/equilax_kernels/affine_fixed_point/rules.py",
        "is_far = ~(moved < knobs.atol + knobs.rtol * size) & (moved > 0)",
        "is_far = (moved >= knobs.atol + knobs.rtol * size) & (moved > 0)",
        ("tests/kernels/test_affine_fixed_point.py", "-k", "below_zero"),
    ),
    Mutation(
        "rounding is taken for a solution",
        "src/equilax/_linear/base.py",
        "limit = _RESOLVED_IN_HALF if eps > 1e-6 else _RESOLVED",
        "limit = _RESOLVED_IN_HALF",
        _SINGULAR,
    ),
    Mutation(
        "an unknown solution is usable",
        "src/equilax/_adjoint/matrix_free.py",
        "            is_usable = is_usable & ~is_lost",
        "            pass",
        _SINGULAR,
    ),
    Mutation(
        "an unknown solution of Lineax is usable",
        "src/equilax/_adjoint/through_lineax.py",
        "        is_usable = is_usable & ~is_lost\n",
        "",
        _SINGULAR,
    ),
    Mutation(
        "a singular system is called a success",
        "src/equilax/_adjoint/outcome.py",
        "return RESULTS.where(is_singular, cast(RESULTS, RESULTS.singular), result)",
        "return result",
        _SINGULAR,
    ),
    Mutation(
        "the last sample that failed for the first",
        "src/equilax/_failure.py",
        "first = jnp.argmax(is_failed)",
        "first = rows.shape[0] - 1 - jnp.argmax(is_failed[::-1])",
        _MESSAGES,
    ),
    Mutation(
        "a sample of a batch of batches by its inner number",
        "src/equilax/_failure.py",
        "lane = of_first[:1] + first.astype(jnp.int32) * num_below",
        "lane = of_first[:1] + first.astype(jnp.int32)",
        _MESSAGES,
    ),
    Mutation(
        "one sample for all that failed",
        "src/equilax/_failure.py",
        "counts = jnp.sum(counts, axis=0, dtype=jnp.int32)",
        "counts = jnp.max(counts, axis=0)",
        _MESSAGES,
    ),
    Mutation(
        "a residual by its bits",
        "src/equilax/_failure.py",
        "            residual = residual.view(np.float32)\n",
        "",
        _MESSAGES,
    ),
)
