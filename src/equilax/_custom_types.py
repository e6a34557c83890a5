from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar


Args: TypeAlias = PyTree[Any]
Aux = TypeVar("Aux")
SolverState = TypeVar("SolverState")
Y = TypeVar("Y")

Fn: TypeAlias = Callable[[Y, Args], tuple[Y, Aux]]
NoAuxFn: TypeAlias = Callable[[Y, Args], Y]
MaybeAuxFn: TypeAlias = Fn[Y, Aux] | NoAuxFn[Y]

BoolScalar: TypeAlias = Bool[Array, ""]
IntScalar: TypeAlias = Int[Array, ""]
RealScalarLike: TypeAlias = float | int | Float[Array, ""]
# Of mesh axes along which something is split: none, one or several.
AxisName: TypeAlias = str | tuple[str, ...] | None
Norm: TypeAlias = Callable[..., Scalar]
