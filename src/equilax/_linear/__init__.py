from .base import (
    AbstractMatrixFreeSolver as AbstractMatrixFreeSolver,
    is_at_rounding as is_at_rounding,
)
from .fixed_point import FixedPointLinearSolver as FixedPointLinearSolver
from .krylov import KrylovLinearSolver as KrylovLinearSolver
from .neumann import Neumann as Neumann
