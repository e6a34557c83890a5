"""A monotone operator `I - W` as a solve needs it: formed once, ahead of the steps."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array, Complex, Float, PyTree, Scalar

from .._custom_types import RealScalarLike
from .._dtype import at_least_single


class AbstractMonotoneMap(eqx.Module):
    """Abstract base class for `W`, of which $I - W$ is strongly monotone.

    **Attributes:**

    - `margin`: The modulus $m$ of monotonicity of $I - W$.
    """

    margin: eqx.AbstractVar[float]

    @abc.abstractmethod
    def mv(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product of `W` with `z`."""

    @abc.abstractmethod
    def norm(self) -> Scalar:
        """The two-norm of $I - W$, in the metric in which it is monotone."""

    @abc.abstractmethod
    def factorise(
        self, alpha: RealScalarLike, linear_solver: lx.AbstractLinearSolver
    ) -> PyTree[Any]:
        r"""The state of `linear_solver` for $I + \alpha (I - W)$."""

    @abc.abstractmethod
    def compute(
        self,
        linear_solver: lx.AbstractLinearSolver,
        state: PyTree[Any],
        vector: Float[Array, "..."],
        *,
        is_transposed: bool,
    ) -> Float[Array, "..."]:
        """Solve for `vector` by what `factorise` has returned."""


class DenseMap(AbstractMonotoneMap):
    """A `W` that is a matrix.

    **Attributes:**

    - `metric`: The square roots of the weights of the inner product in which $I - W$ is
        monotone. `None` is the plain one.
    """

    weight: Float[Array, "n n"]
    margin: float = eqx.field(static=True)
    metric: Float[Array, " n"] | None = None

    def mv(self, z):
        return self.weight.astype(z.dtype) @ z

    def _wide(self):
        weight = self.weight.astype(at_least_single(self.weight.dtype))
        return jnp.eye(len(weight), dtype=weight.dtype), weight

    def norm(self):
        eye, weight = self._wide()
        matrix = eye - weight
        if self.metric is not None:
            metric = self.metric.astype(matrix.dtype)
            matrix = metric[:, None] * matrix / metric[None, :]
        return jnp.linalg.norm(matrix, ord=2)

    def factorise(self, alpha, linear_solver):
        eye, weight = self._wide()
        matrix = eye + jnp.asarray(alpha, eye.dtype) * (eye - weight)
        return linear_solver.init(lx.MatrixLinearOperator(matrix), {})

    def compute(self, linear_solver, state, vector, *, is_transposed):
        options = {}
        if is_transposed:
            state, options = linear_solver.transpose(state, options)
        return linear_solver.compute(state, vector, options)[0]


class FourierMap(AbstractMonotoneMap):
    """A circular convolution, as a matrix between channels for each frequency.

    **Attributes:**

    - `spectrum`: Those matrices. Of the frequencies of a real signal half are enough.
    - `shape`: The height and width of the signal.
    """

    spectrum: Complex[Array, "frequencies half channels channels"]
    margin: float = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def _eye(self):
        return jnp.eye(self.spectrum.shape[-1], dtype=self.spectrum.dtype)

    def _forward(self, z):
        return jnp.moveaxis(jnp.fft.rfft2(z.astype(at_least_single(z.dtype))), 0, -1)

    def _backward(self, spectrum, dtype):
        signal = jnp.fft.irfft2(jnp.moveaxis(spectrum, -1, 0), self.shape)
        return signal.astype(dtype)

    def mv(self, z):
        product = jnp.einsum("hwij,hwj->hwi", self.spectrum, self._forward(z))
        return self._backward(product, z.dtype)

    def norm(self):
        matrices = self._eye()[None, None] - self.spectrum
        return jnp.max(jnp.linalg.svd(matrices, compute_uv=False))

    def factorise(self, alpha, linear_solver):
        eye = self._eye()
        alpha = jnp.asarray(alpha, eye.real.dtype).astype(eye.dtype)

        def of_frequency(matrix):
            matrix = eye + alpha * (eye - matrix)
            return linear_solver.init(lx.MatrixLinearOperator(matrix), {})

        return jax.vmap(jax.vmap(of_frequency))(self.spectrum)

    def compute(self, linear_solver, state, vector, *, is_transposed):
        # The transpose of a real map has the conjugate transpose at each frequency, and
        # A^H x = v is A^T conj(x) = conj(v). Not by `LU.conj`, which in Lineax 0.1.1
        # transposes as well.
        def of_frequency(state, vector):
            options = {}
            if not is_transposed:
                return linear_solver.compute(state, vector, options)[0]
            state, options = linear_solver.transpose(state, options)
            return linear_solver.compute(state, vector.conj(), options)[0].conj()

        solution = jax.vmap(jax.vmap(of_frequency))(state, self._forward(vector))
        return self._backward(solution, vector.dtype)


class Resolvent(eqx.Module):
    r"""$(I + \alpha (I - W))^{-1}$, by a factorisation that is there already.

    Its derivative in `W` is that of the inverse, with the same factorisation.
    """

    map: AbstractMonotoneMap
    alpha: RealScalarLike
    linear_solver: lx.AbstractLinearSolver
    state: PyTree[Any]

    def __init__(
        self,
        map: AbstractMonotoneMap,
        alpha: RealScalarLike,
        linear_solver: lx.AbstractLinearSolver,
    ):
        self.map = map
        self.alpha = alpha
        self.linear_solver = linear_solver
        self.state = map.factorise(alpha, linear_solver)
        arrays, rest = eqx.partition(self.state, eqx.is_array)
        self.state = eqx.combine(lax.stop_gradient(arrays), rest)

    def __call__(self, v: Float[Array, "..."]) -> Float[Array, "..."]:
        # Factorisations have no half precision.
        wide = v.astype(at_least_single(v.dtype))
        alpha = jnp.asarray(self.alpha, wide.dtype)

        def mv(z):
            return z + alpha * (z - self.map.mv(z))

        def solve(_, vector):
            return self._compute(vector, is_transposed=False)

        def transpose_solve(_, vector):
            return self._compute(vector, is_transposed=True)

        solution = lax.custom_linear_solve(
            mv, wide, solve, transpose_solve=transpose_solve
        )
        return solution.astype(v.dtype)

    def _compute(self, vector, *, is_transposed):
        return self.map.compute(
            self.linear_solver, self.state, vector, is_transposed=is_transposed
        )
