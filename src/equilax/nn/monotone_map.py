"""A monotone operator `I - W` as a solve needs it: formed once, ahead of the steps."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array, Complex, Float, Inexact, Scalar

from .._custom_types import RealScalarLike
from .._dtype import at_least_single
from .._mesh import all_vary, any_varying
from .norm_bound import norm_bound


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
        """A bound on the two-norm of $I - W$, in the metric in which it is monotone.

        At most a factor of `n**(1/64)` above it, with `n` the size of the matrices.
        """

    @abc.abstractmethod
    def inverse(
        self, alpha: RealScalarLike, linear_solver: lx.AbstractLinearSolver
    ) -> "AbstractMonotoneMap":
        r"""$(I + \alpha (I - W))^{-1}$, as a map like this one."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractMonotoneMap":
        """The transpose of `W`."""


def _invert(
    matrix: Inexact[Array, "n n"],
    alpha: RealScalarLike,
    linear_solver: lx.AbstractLinearSolver,
) -> Inexact[Array, "n n"]:
    r"""$(I + \alpha (I - W))^{-1}$ by one factorisation.

    Its condition is at most $(1 + \alpha L) / (1 + \alpha m)$: an inverse is as good
    as the factors, and a product with it quicker than two triangular solves.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    alpha = jnp.asarray(alpha, eye.real.dtype).astype(eye.dtype)
    # Lineax 0.1.1 compares a right-hand side with the structure of the operator, its
    # sharding included, which a `MatrixLinearOperator` has not inside `shard_map`. Its
    # `linear_solve` has no version in there at all.
    like = jax.eval_shape(lambda: eye[0])
    operator = lx.PyTreeLinearOperator(eye + alpha * (eye - matrix), like)
    state = linear_solver.init(operator, {})
    return jax.vmap(lambda e: linear_solver.compute(state, e, {})[0])(eye).T


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
        return self.weight.astype(at_least_single(self.weight.dtype))

    def norm(self):
        weight = self._wide()
        matrix = jnp.eye(len(weight), dtype=weight.dtype) - weight
        if self.metric is not None:
            metric = self.metric.astype(matrix.dtype)
            matrix = metric[:, None] * matrix / metric[None, :]
        return norm_bound(matrix)

    def inverse(self, alpha, linear_solver):
        weight = _invert(self._wide(), alpha, linear_solver)
        return eqx.tree_at(lambda m: m.weight, self, weight)

    def transpose(self):
        return eqx.tree_at(lambda m: m.weight, self, self.weight.T)


class FourierMap(AbstractMonotoneMap):
    """A circular convolution, as a matrix between channels for each frequency.

    **Attributes:**

    - `spectrum`: Those matrices. Of the frequencies of a real signal half are enough.
    - `shape`: The height and width of the signal.
    """

    spectrum: Complex[Array, "frequencies half channels channels"]
    margin: float = eqx.field(static=True)
    shape: tuple[int, int] = eqx.field(static=True)

    def mv(self, z):
        wide = z.astype(at_least_single(z.dtype))
        product = jnp.einsum("hwij,jhw->ihw", self.spectrum, jnp.fft.rfft2(wide))
        return jnp.fft.irfft2(product, self.shape).astype(z.dtype)

    def norm(self):
        eye = jnp.eye(self.spectrum.shape[-1], dtype=self.spectrum.dtype)
        matrices = eye[None, None] - self.spectrum
        return jnp.max(jax.vmap(jax.vmap(norm_bound))(matrices))

    def inverse(self, alpha, linear_solver):
        invert = lambda matrix: _invert(matrix, alpha, linear_solver)
        spectrum = jax.vmap(jax.vmap(invert))(self.spectrum)
        return eqx.tree_at(lambda m: m.spectrum, self, spectrum)

    def transpose(self):
        # Of a real map: the conjugate transpose at each frequency.
        spectrum = jnp.swapaxes(self.spectrum, -1, -2).conj()
        return eqx.tree_at(lambda m: m.spectrum, self, spectrum)


class Resolvent(eqx.Module):
    r"""$(I + \alpha (I - W))^{-1}$, with the work of it done once.

    Its derivative in `W` is that of a linear solve, by the same inverse.
    """

    map: AbstractMonotoneMap
    alpha: RealScalarLike
    inverse: AbstractMonotoneMap

    def __init__(
        self,
        map: AbstractMonotoneMap,
        alpha: RealScalarLike,
        linear_solver: lx.AbstractLinearSolver,
    ):
        self.map = map
        self.alpha = alpha
        self.inverse = lax.stop_gradient(map).inverse(alpha, linear_solver)

    def __call__(self, v: Float[Array, "..."]) -> Float[Array, "..."]:
        # JAX (to 0.12) lets all constants of a `custom_linear_solve` vary as its
        # right-hand side does, after their types have gone into the trace.
        this, v = all_vary((self, v), any_varying(self, v))
        alpha = jnp.asarray(this.alpha, v.dtype)

        def mv(z):
            return z + alpha * (z - this.map.mv(z))

        def solve(_, vector):
            return this.inverse.mv(vector)

        def transpose_solve(_, vector):
            return this.inverse.transpose().mv(vector)

        return lax.custom_linear_solve(mv, v, solve, transpose_solve=transpose_solve)
