"""The public names, each with a docstring in the template of the house."""

import inspect
from pathlib import Path

import equilax as eqlx
import equilax_kernels
import equinox as eqx
import pytest


_NAMES = {
    "AbstractAdjoint",
    "AbstractBatching",
    "AbstractFixedPointSolver",
    "AbstractImplicitAdjoint",
    "AbstractInverseEstimate",
    "AbstractLineSearch",
    "AbstractMatrixFreeSolver",
    "AdjointMonitor",
    "Aitken",
    "AlternatingAnderson",
    "Anderson",
    "AndersonTypeI",
    "Auto",
    "BadBroyden",
    "Backtracking",
    "BestSoFar",
    "Broyden",
    "EquilibriumSigns",
    "ErrorBound",
    "FallbackLinearSolver",
    "FixedPointIteration",
    "FixedPointLinearSolver",
    "FullStep",
    "ImplicitAdjoint",
    "KrylovLinearSolver",
    "Lockstep",
    "Neumann",
    "Newton",
    "NewtonKrylov",
    "OnFailure",
    "RESULTS",
    "RecursiveCheckpointAdjoint",
    "Reversible",
    "ReversibleAdjoint",
    "SharedInverseAdjoint",
    "Solution",
    "Squarem",
    "Staged",
    "Terms",
    "Traced",
    "UpTo",
    "Vmapped",
    "correction_loss",
    "equilibrium_signs",
    "error_bound",
    "fixed_point",
    "iterates",
    "jacobian_penalty",
    "max_norm",
    "nn",
    "RelativeToNorm",
    "rms_norm",
    "sharding",
    "solve_adjoint",
    "spectral_radius",
    "two_norm",
}
_NN_NAMES = {
    "AbstractFusedCell",
    "AbstractFusedMap",
    "AbstractParametrisation",
    "AbstractStatefulParametrisation",
    "AffineCell",
    "AffineMap",
    "ContractiveLinear",
    "ConvCell",
    "FixedPointLayer",
    "ForwardBackward",
    "FusedEnd",
    "GraphCell",
    "GRUCell",
    "LipschitzBoundedLayer",
    "MLPCell",
    "MonotoneConv",
    "MonotoneLayer",
    "MonotoneLinear",
    "MultiscaleCell",
    "normalise_adjacency",
    "PeacemanRachford",
    "PositiveConcaveCell",
    "prepare",
    "prepare_with_state",
    "SpectralNorm",
    "ToleranceSchedule",
    "TransformerCell",
    "VariationalDropout",
    "WarmStart",
    "WeightNorm",
}
_SHARDING_NAMES = {"shard_vmap"}
_KERNEL_NAMES = {
    "affine_fixed_point",
    "affine_kernels",
    "max_residual",
    "on_platform",
    "spd_solve",
}
_PUBLIC = {name: getattr(eqlx, name) for name in sorted(_NAMES - {"nn", "sharding"})}
_PUBLIC |= {f"nn.{name}": getattr(eqlx.nn, name) for name in sorted(_NN_NAMES)}
_PUBLIC |= {f"sharding.{n}": getattr(eqlx.sharding, n) for n in _SHARDING_NAMES}
_PUBLIC |= {name: getattr(equilax_kernels, name) for name in sorted(_KERNEL_NAMES)}
_MODULES = {k: v for k, v in _PUBLIC.items() if inspect.isclass(v)}
every = pytest.mark.parametrize("name", list(_PUBLIC))
every_module = pytest.mark.parametrize(
    "name", sorted(_MODULES.keys() - {"OnFailure", "RESULTS"})
)


def _public(module):
    is_module = inspect.ismodule
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (not is_module(value) or value in (eqlx.nn, eqlx.sharding))
        and name != "importlib"
    }


def test_the_public_names_are_exactly_these():
    assert _public(eqlx) == _NAMES
    files = {path.stem for path in Path(eqlx.nn.__path__[0]).glob("*.py")}
    assert _public(eqlx.nn) - files == _NN_NAMES
    assert _public(eqlx.sharding) == _SHARDING_NAMES
    types = {"RowSolution", "Status"}
    assert _public(equilax_kernels) - {"spd_solve"} - types == _KERNEL_NAMES - {
        "spd_solve"
    }
    assert callable(equilax_kernels.spd_solve)


@every
def test_each_has_a_docstring_of_the_house(name):
    value = _PUBLIC[name]
    doc = inspect.getdoc(value)
    assert doc
    summary = doc.split("\n\n")[0]
    assert summary.rstrip().endswith((".", ":")), summary
    if inspect.isfunction(value) or name == "fixed_point":
        for heading in ("**Arguments:**", "**Returns:**"):
            assert heading in doc, heading
        parameters = inspect.signature(value).parameters
        for parameter in parameters:
            assert f"`{parameter}`" in doc, parameter


@every_module
def test_the_arguments_of_a_constructor_are_told(name):
    value = _MODULES[name]
    if name.startswith("Abstract") or name == "Solution":
        return
    parameters = list(inspect.signature(value).parameters)
    doc = inspect.getdoc(value.__init__) or ""
    if parameters:
        assert "**Arguments:**" in doc
    for parameter in parameters:
        assert f"- `{parameter}`: " in doc, parameter
    for line in doc.splitlines():
        if line.startswith("- `"):
            assert line.split("`")[1] in parameters, line


@every_module
def test_costs_are_told(name):
    value = _MODULES[name]
    doc = inspect.getdoc(value) or ""
    is_solver = issubclass(value, (eqlx.AbstractFixedPointSolver, eqlx.AbstractAdjoint))
    if is_solver and not name.startswith("Abstract"):
        assert "Cost:" in doc or "evaluations" in doc
        assert "emory" in doc


@every_module
def test_classes_are_abstract_or_final(name):
    value = _MODULES[name]
    assert issubclass(value, eqx.Module)
    for base in value.__mro__[1:]:
        if base.__module__.startswith("equilax"):
            assert base.__name__.startswith("Abstract"), base


@every
def test_methods_that_users_call_are_documented(name):
    value = _PUBLIC[name]
    if not inspect.isclass(value) or not name.startswith("nn."):
        return
    for method in ("__call__", "solve", "init"):
        if method in vars(value):
            assert inspect.getdoc(vars(value)[method]), method
