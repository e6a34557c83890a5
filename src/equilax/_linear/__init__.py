from .base import (
    AbstractMatrixFreeSolver as AbstractMatrixFreeSolver,
    is_at_rounding as is_at_rounding,
    is_resolved as is_resolved,
    Preconditioned as Preconditioned,
    solve_from as solve_from,
)
from .fallback import FallbackLinearSolver as FallbackLinearSolver
from .fixed_point import FixedPointLinearSolver as FixedPointLinearSolver
from .krylov import KrylovLinearSolver as KrylovLinearSolver
from .neumann import Neumann as Neumann
from .terms import Terms as Terms
