"""The public surface as a table of good calls, and the values to spoil them with."""

from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np


nn = eqlx.nn
_tolerances = dict(rtol=1e-5, atol=1e-5)
_key = dict(key=jr.key(0))
_sizes = dict(in_features=3, features=4)
_solver = eqlx.Anderson(1e-5, 1e-5)
_knobs = dict(norm=eqlx.max_norm, axis_name=None)
_solve = dict(adjoint=eqlx.ImplicitAdjoint(), batching=eqlx.Staged(), max_steps=64)
_made = _key | dict(dtype=jnp.float32)

# A good value for each argument of each constructor.
CONSTRUCTORS: dict[Any, dict[str, Any]] = {
    eqlx.FixedPointIteration: _tolerances | _knobs | dict(damp=0.1),
    eqlx.Aitken: _tolerances | _knobs,
    eqlx.Squarem: _tolerances | _knobs,
    eqlx.Anderson: _tolerances
    | _knobs
    | dict(history_length=3, damp=0.1, ridge=1e-10, safeguard=2.0),
    eqlx.AlternatingAnderson: _tolerances
    | _knobs
    | dict(history_length=3, period=2, damp=0.1, ridge=1e-10, safeguard=2.0),
    eqlx.AndersonTypeI: _tolerances
    | _knobs
    | dict(history_length=3, damp=0.1, regularisation=0.01, independence=1e-3)
    | dict(safeguard=10.0),
    eqlx.Broyden: _tolerances
    | _knobs
    | dict(history_length=4, line_search=eqlx.FullStep()),
    eqlx.BadBroyden: _tolerances | _knobs | dict(history_length=4),
    eqlx.Newton: _tolerances
    | dict(norm=eqlx.max_norm, linear_solver=lx.LU(), tags=frozenset())
    | dict(line_search=eqlx.Backtracking()),
    eqlx.NewtonKrylov: _tolerances
    | _knobs
    | dict(restart=4, max_linear_steps=20, max_forcing=0.1)
    | dict(line_search=eqlx.Backtracking()),
    eqlx.Auto: _tolerances | _knobs | dict(history_length=4, restart=4),
    eqlx.Reversible: _tolerances | _knobs | dict(beta=0.8),
    eqlx.BestSoFar: dict(solver=_solver),
    eqlx.Traced: dict(solver=_solver),
    eqlx.UpTo: dict(solver=_solver, num_steps=3),
    eqlx.RelativeToNorm: dict(norm=eqlx.two_norm),
    eqlx.Backtracking: dict(decrease=1e-4, factor=0.5, growth=0.0, min_length=1e-3),
    eqlx.Staged: dict(factor=4, min_size=2),
    eqlx.ImplicitAdjoint: dict(
        linear_solver=eqlx.KrylovLinearSolver(),
        preconditioner=None,
        on_failure=eqlx.OnFailure.nan,
    ),
    eqlx.SharedInverseAdjoint: dict(
        linear_solver=eqlx.Neumann(0), max_growth=None, on_failure=eqlx.OnFailure.nan
    ),
    eqlx.RecursiveCheckpointAdjoint: dict(checkpoints=None),
    eqlx.ReversibleAdjoint: dict(max_error=1e-2, on_failure=eqlx.OnFailure.zero),
    eqlx.FixedPointLinearSolver: dict(solver=_solver, max_steps=9),
    eqlx.KrylovLinearSolver: dict(rtol=1e-5, atol=0.0, restart=4, max_steps=9),
    eqlx.FallbackLinearSolver: dict(
        first=eqlx.FixedPointLinearSolver(), second=eqlx.KrylovLinearSolver()
    ),
    eqlx.Neumann: dict(num_terms=3, damp=0.1),
    nn.FixedPointLayer: _solve
    | dict(cell=lambda z, x: 0.5 * z + x, solver=_solver, throw=False, fuse=True),
    nn.AffineCell: _sizes | _made | dict(activation=jnp.tanh),
    nn.GRUCell: _sizes | _made,
    nn.MLPCell: _sizes | _made | dict(width=5, depth=1, activation=jnp.tanh),
    nn.GraphCell: _sizes | _made | dict(activation=jnp.tanh),
    nn.PositiveConcaveCell: _sizes | _made | dict(activation=jnp.tanh, floor=0.01),
    nn.ConvCell: _made
    | dict(in_channels=2, channels=4, groups=2, activation=jax.nn.relu),
    nn.MultiscaleCell: _made
    | dict(in_channels=2, channels=(2, 4), groups=2, activation=jax.nn.relu),
    nn.TransformerCell: _sizes
    | _made
    | dict(num_heads=2, width=4, activation=jnp.tanh, causal=False, pre_norm=False)
    | dict(position=None, dropout=0.0),
    nn.ContractiveLinear: _made | dict(features=3, bound=0.9, axis=1),
    nn.MonotoneLinear: _made | dict(features=3, margin=1.0),
    nn.MonotoneConv: _made | dict(channels=2, kernel_size=3, margin=1.0),
    nn.ForwardBackward: dict(alpha=None),
    nn.PeacemanRachford: dict(alpha=None, linear_solver=lx.LU()),
    nn.MonotoneLayer: _solve
    | dict(
        linear=nn.MonotoneLinear(3, key=jr.key(1)),
        injection=lambda x: x,
        splitting=nn.ForwardBackward(),
        solver=_solver,
        activation=jax.nn.relu,
        throw=False,
    ),
    nn.LipschitzBoundedLayer: _solve
    | _sizes
    | _made
    | dict(out_features=2, gamma=1.0, splitting=nn.ForwardBackward(), margin=0.1)
    | dict(solver=_solver, activation=jax.nn.relu, throw=False),
    nn.SpectralNorm: _key
    | dict(weight=jnp.ones((3, 2)), bound=0.9, num_iterations=2, inference=False),
    nn.WeightNorm: dict(weight=jnp.ones((3, 2))),
    nn.ToleranceSchedule: dict(first=1e-2, last=1e-4, num_steps=10),
    nn.VariationalDropout: dict(p=0.5, axes=(), inference=False),
    nn.WarmStart: dict(num_samples=3, like=jnp.zeros(2)),
}

# What no argument wants, or few.
ODD: dict[str, Any] = {
    "None": None,
    "minus one": -1,
    "zero": 0,
    "one": 1,
    "two and a half": 2.5,
    "minus half": -0.5,
    "True": True,
    "nan": float("nan"),
    "inf": float("inf"),
    "text": "anderson",
    "object": object(),
    "complex": 1j,
    "list": [1.0, 2.0],
    "empty tuple": (),
    "dict": {"a": 1.0},
    "class": eqlx.Anderson,
    "function of none": lambda: None,
    "numpy integer": np.int32(3),
    "numpy number": np.float32(0.5),
    "numpy nan": np.float64("nan"),
    "numpy vector": np.ones(3),
    "numpy strided": np.arange(6.0)[::2],
    "numpy objects": np.array([None, 1]),
    "numpy text": np.array("a"),
    "jax integer": jnp.array(3),
    "jax number": jnp.array(0.5),
    "jax nan": jnp.array(float("nan")),
    "jax bools": jnp.array([True, False, True]),
    "jax vector": jnp.ones(3),
    "jax empty": jnp.zeros((0,)),
    "jax complex": jnp.array(0.5 + 0.5j),
    "key": jr.key(3),
    "old key": jr.PRNGKey(3),
    "keys": jr.split(jr.key(3), 3),
    "shape": jax.ShapeDtypeStruct((3,), jnp.float32),
    "batching": eqlx.Lockstep(),
    "solver": eqlx.FixedPointIteration(1e-3, 1e-3),
    "linear solver": lx.LU(),
}

# States of all kinds. The fixed point of `towards_two` is two, whatever the state.
STATES: dict[str, Any] = {
    "python number": 1.0,
    "python complex": 1j,
    "numpy number": np.float64(1.0),
    "strided": np.arange(12.0, dtype=np.float32)[::-2],
    "transposed": np.zeros((2, 3), np.float32).T,
    "read only": np.broadcast_to(np.float32(1), (3,)),
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.zeros(()),
    "bfloat16": jnp.zeros(3, jnp.bfloat16),
    "float16": np.zeros(2, np.float16),
    "complex64": jnp.zeros(2, jnp.complex64),
    "tree": {"a": (jnp.zeros(2), None), "b": [np.zeros(1, np.float32), 0.5]},
    "nan": jnp.array([jnp.nan, 0.0]),
    "infinite": jnp.array([jnp.inf, 0.0]),
    "huge": jnp.array([3e38, 1.0], jnp.float32),
    "denormal": jnp.array([1e-40, 0.0], jnp.float32),
}


def towards_two(y, args):
    del args
    return jax.tree.map(lambda x: 0.5 * x + 1, y)


_y = jnp.zeros(3, jnp.float32)
_sol = eqlx.fixed_point(towards_two, _solver, _y)
_mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
_layer = nn.FixedPointLayer(towards_two, _solver)


def shard_vmapped(fn, mesh, axis_name, in_axes):
    return eqlx.sharding.shard_vmap(fn, mesh, axis_name, in_axes=in_axes)(_y)


# Good arguments of each function, and what it then returns or has as its value.
FUNCTIONS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "fixed_point": (
        eqlx.fixed_point,
        _solve
        | dict(fn=towards_two, solver=_solver, y0=_y, args=None, has_aux=False)
        | dict(throw=False, tags=frozenset(), batch_axis=None, state=None)
        | dict(monitor=None),
        2.0,
    ),
    "solve_adjoint": (
        eqlx.solve_adjoint,
        dict(fn=towards_two, solver=_solver, y=_y + 2, cotangent=_y + 1, args=None)
        | dict(has_aux=False, adjoint=eqlx.ImplicitAdjoint(), throw=False)
        | dict(batching=eqlx.Staged(), tags=frozenset(), batch_axis=None)
        | dict(state=None, guess=None),
        2.0,
    ),
    "iterates": (
        eqlx.iterates,
        dict(fn=towards_two, solver=_solver, y0=_y, args=None, indices=(20,))
        | dict(has_aux=False),
        2.0,
    ),
    "correction_loss": (
        eqlx.correction_loss,
        dict(loss=lambda y: jnp.sum(y), points=jnp.ones((1, 2)), decay=0.5),
        2.0,
    ),
    "spectral_radius": (
        eqlx.spectral_radius,
        _key | dict(fn=towards_two, y=_y, args=None, num_steps=3, has_aux=False),
        0.5,
    ),
    "jacobian_penalty": (
        eqlx.jacobian_penalty,
        _key | dict(fn=towards_two, y=_y, args=None, num_samples=1, has_aux=False),
        0.25,
    ),
    "error_bound": (
        eqlx.error_bound,
        dict(sol=_sol, fn=towards_two, args=None, has_aux=False, num_steps=4)
        | dict(tolerance=0.0),
        None,
    ),
    "equilibrium_signs": (
        eqlx.equilibrium_signs,
        dict(fn=towards_two, solver=_solver, y0=_y, args=None, starts=_y[None])
        | dict(output=lambda y: y, tolerance=0.1, max_steps=20)
        | dict(batching=eqlx.Staged(), has_aux=False),
        None,
    ),
    "layer": (_layer, dict(x=_y + 1, z0=None, key=None, monitor=None), 2.0),
    "shard_vmap": (
        shard_vmapped,
        dict(fn=lambda x: x + 2, mesh=_mesh, axis_name="b", in_axes=0),
        2.0,
    ),
    **{
        name: (getattr(eqlx, name), dict(x=_y + 2, axis_name=None), size)
        for name, size in (("max_norm", 2), ("two_norm", 2 * 3**0.5), ("rms_norm", 2))
    },
}
