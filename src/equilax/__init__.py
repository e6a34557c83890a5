import importlib.metadata

from . import nn as nn, sharding as sharding
from ._adjoint import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractImplicitAdjoint as AbstractImplicitAdjoint,
    AdjointMonitor as AdjointMonitor,
    ImplicitAdjoint as ImplicitAdjoint,
    OnFailure as OnFailure,
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    SharedInverseAdjoint as SharedInverseAdjoint,
)
from ._batching import (
    AbstractBatching as AbstractBatching,
    Lockstep as Lockstep,
    Staged as Staged,
    Vmapped as Vmapped,
)
from ._diagnostics import (
    correction_loss as correction_loss,
    equilibrium_signs as equilibrium_signs,
    EquilibriumSigns as EquilibriumSigns,
    error_bound as error_bound,
    ErrorBound as ErrorBound,
    iterates as iterates,
    jacobian_penalty as jacobian_penalty,
    spectral_radius as spectral_radius,
)
from ._fixed_point import fixed_point as fixed_point
from ._linear import (
    AbstractMatrixFreeSolver as AbstractMatrixFreeSolver,
    FallbackLinearSolver as FallbackLinearSolver,
    FixedPointLinearSolver as FixedPointLinearSolver,
    KrylovLinearSolver as KrylovLinearSolver,
    Neumann as Neumann,
    Terms as Terms,
)
from ._norm import (
    max_norm as max_norm,
    RelativeToNorm as RelativeToNorm,
    rms_norm as rms_norm,
    two_norm as two_norm,
)
from ._solution import RESULTS as RESULTS, Solution as Solution
from ._solve_adjoint import solve_adjoint as solve_adjoint
from ._solver import (
    AbstractFixedPointSolver as AbstractFixedPointSolver,
    AbstractInverseEstimate as AbstractInverseEstimate,
    AbstractLineSearch as AbstractLineSearch,
    Aitken as Aitken,
    AlternatingAnderson as AlternatingAnderson,
    Anderson as Anderson,
    AndersonTypeI as AndersonTypeI,
    Auto as Auto,
    Backtracking as Backtracking,
    BadBroyden as BadBroyden,
    BestSoFar as BestSoFar,
    Broyden as Broyden,
    FixedPointIteration as FixedPointIteration,
    FullStep as FullStep,
    Newton as Newton,
    NewtonKrylov as NewtonKrylov,
    Reversible as Reversible,
    Squarem as Squarem,
    Traced as Traced,
    UpTo as UpTo,
)


__version__ = importlib.metadata.version("equilax")
