"""What must hold of every solve, and how exactly."""

import numpy as np

from .maps import to_real, Truth
from .runs import NEUMANN_TERMS, RESULT_NAMES, Structure, UP_TO


def check_status(s: Structure, truth: Truth, out, rtol: float, atol: float) -> bool:
    """A status says what is true of the value. Returns whether it is success."""
    value, result = to_real(s.kind, out["value"]), RESULT_NAMES[int(out["result"])]
    steps, residual = int(out["num_steps"]), float(out["residual"])
    assert np.all(np.isfinite(value))
    moved = np.abs(truth(value) - value)
    size = np.abs(value)
    if s.kind.is_complex:
        moved, size = (np.hypot(*np.split(a, 2)) for a in (moved, size))
    rounding = truth.rounding(value)
    true = float(np.max(moved, initial=0))
    assert abs(residual - true) <= rounding + 1e-3 * s.kind.eps * true
    tolerance = (1 + 32 * s.kind.eps) * (atol + rtol * size)
    assert 0 <= steps <= s.max_steps
    if result == "successful":
        assert np.all(moved <= tolerance + rounding)
        return True
    # Where it did converge it may not say that it did not.
    assert np.any(moved + rounding >= (1 - 32 * s.kind.eps) * (atol + rtol * size))
    # Nothing here can overflow, nor grow beyond bounds.
    assert result in ("max_steps_reached", "stagnation")
    if result == "max_steps_reached":
        assert steps == (
            min(s.max_steps, UP_TO) if s.solver == "up_to" else s.max_steps
        )
    return False


def check_value(s: Structure, truth: Truth, value) -> None:
    """A contraction's error is at most its residual over one minus its factor."""
    if truth.gain >= 0.99:
        return
    value = to_real(s.kind, value)
    error = np.linalg.norm(value - truth.solve())
    assert error <= np.linalg.norm(truth(value) - value) / (1 - truth.gain) + 1e-12


class Derivative:
    """The sensitivity of a solution, and how far off a computed one may be."""

    def __init__(self, s: Structure, truth: Truth, value, rtol: float, atol: float):
        self.s, self.truth, self.value = s, truth, to_real(s.kind, value)
        jacobian = truth.slope(self.value) @ truth.w
        if s.adjoint == "neumann":
            powers = [np.linalg.matrix_power(jacobian, k) for k in range(1 + 3)]
            self.inverse = sum(powers[: NEUMANN_TERMS + 1], np.zeros_like(jacobian))
        else:
            self.inverse = truth.inverse(self.value)
        self.amplification = _norm(truth.inverse(self.value))
        size = max(float(np.max(np.abs(self.value), initial=0)), 1.0)
        eps = s.kind.eps
        self.tolerance = max(min(rtol + atol / size, 1e-3), 4 * eps)
        # One that stopped at the level of rounding is taken as it is.
        self.tolerance = max(self.tolerance, min(64 * eps, max(1e-3, 32 * eps)))
        self.rounding = (truth.num_terms + 16) * eps

    def of(self, vector, *, is_transposed: bool):
        """The solution for a right-hand side, and the bound of its error."""
        inverse = self.inverse.T if is_transposed else self.inverse
        solution = inverse @ vector
        largest = float(np.max(np.abs(solution), initial=0))
        size = float(np.max(np.abs(vector), initial=0))
        root = np.sqrt(max(vector.size, 1))
        left = self.tolerance * size + self.rounding * (largest + size)
        return solution, root * self.amplification * left

    def check_gradient(self, ct, got) -> None:
        """`got` is the gradient in the weights, in `x` and in `y0`."""
        u, bound = self.of(to_real(self.s.kind, ct), is_transposed=True)
        of_x, of_weights = self.truth.gradient(self.value, u)
        size = 1 + float(np.max(np.abs(self.value), initial=0))
        bound = bound + 16 * self.s.kind.eps * float(np.max(np.abs(u), initial=0))
        _check_close(got[1], of_x, bound)
        _check_close(got[0], of_weights, bound * size)
        assert np.all(np.asarray(got[2]) == 0)

    def check_tangent(self, tangents, got) -> None:
        vector = self.truth.tangent(self.value, *tangents)
        expected, bound = self.of(vector, is_transposed=False)
        # The terms of the right-hand side may cancel.
        size = 1 + float(np.max(np.abs(self.value), initial=0))
        terms = sum(np.sum(np.abs(np.asarray(t).astype(complex))) for t in tangents)
        bound = bound + self.amplification * self.rounding * size * terms
        _check_close(to_real(self.s.kind, got), expected, bound)


def _norm(matrix) -> float:
    return float(np.linalg.norm(matrix, 2)) if matrix.size else 1.0


def _check_close(got, expected, bound):
    got = np.asarray(got)
    is_complex = np.iscomplexobj(got)
    got = got.astype(complex if is_complex else float)
    assert np.max(np.abs(got - expected), initial=0) <= bound + 1e-14
