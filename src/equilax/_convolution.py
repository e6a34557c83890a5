"""Convolutions, in the one layout that is quick in a loop on a CPU.

On a CPU XLA (of jaxlib 0.10 to 0.12) computes a convolution by a library if the
channels are last and the kernel is laid out as (*space, in, out). It transposes others
to that layout, but not inside of a loop, where a plain nest of loops computes them,
thirty times slower. Equinox and PyTorch have the channels first, and what an adjoint
multiplies by, the transpose of a convolution in the quick layout, is in a slow one.
"""

from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact


_Image = Inexact[Array, "..."]
_FEW = 8


def _is_slow(eqn: Any) -> bool:
    if eqn.primitive is not jex.core.primitives.conv_general_dilated_p:
        return False
    lhs, rhs, out = eqn.params["dimension_numbers"]
    space = tuple(range(len(lhs) - 2))
    last = (0, len(lhs) - 1, *(i + 1 for i in space))
    is_quick = (lhs, rhs, out) == (last, (len(rhs) - 1, len(rhs) - 2, *space), last)
    # A group of few channels is quicker in plain loops, measured with one and with 8.
    width = eqn.invars[1].aval.shape[rhs[1]]
    is_split = eqn.params["feature_group_count"] > 1 and width < _FEW
    is_split = is_split or eqn.params["batch_group_count"] > 1
    return 1 <= len(space) <= 3 and not (is_quick or is_split)


def _is_call(eqn: Any) -> bool:
    return eqn.primitive is jex.core.primitives.jit_p


def _has_slow(jaxpr: Any) -> bool:
    return any(
        _is_slow(eqn) or (_is_call(eqn) and _has_slow(eqn.params["jaxpr"].jaxpr))
        for eqn in jaxpr.eqns
    )


def _channels_last(lhs: _Image, rhs: _Image, *, params: dict[str, Any]) -> _Image:
    """The same convolution, its operands and result transposed."""
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    rank = lhs.ndim
    # Where the batch, the channels and space are in the quick layout.
    found = (0, rank - 1, *range(1, rank - 1))
    out = lax.conv_general_dilated_p.bind(
        jnp.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1])),
        jnp.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0])),
        **{
            **params,
            "dimension_numbers": lax.ConvDimensionNumbers(
                found, (rank - 1, rank - 2, *range(rank - 2)), found
            ),
        },
    )
    order = [found[out_spec.index(i)] for i in range(rank)]
    return jnp.transpose(out, order)


def _evaluate(jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, jex.core.Literal) else values[v]
    for eqn in jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        if _is_slow(eqn):
            out = [_channels_last(*given, params=eqn.params)]
        elif _is_call(eqn) and _has_slow(eqn.params["jaxpr"].jaxpr):
            inner = eqn.params["jaxpr"]
            out = _evaluate(inner.jaxpr, inner.consts, given)
        else:
            params = eqn.primitive.get_bind_params(eqn.params)
            with eqn.ctx.manager:
                out = eqn.primitive.bind(*given, **params)
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def with_quick_convolutions(closed: Any) -> Any:
    """A jaxpr of the same values, of quick convolutions where JAX runs on a CPU.

    Those inside of loops, conditionals and custom derivative rules are left as they
    are.
    """
    if jax.default_backend() != "cpu" or not _has_slow(closed.jaxpr):
        return closed
    run = lambda *args: _evaluate(closed.jaxpr, closed.consts, list(args))
    return jax.make_jaxpr(run)(*closed.in_avals)
