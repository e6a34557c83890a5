from .base import AbstractMatrixFreeSolver as AbstractMatrixFreeSolver
from .fixed_point import FixedPointLinearSolver as FixedPointLinearSolver
from .krylov import KrylovLinearSolver as KrylovLinearSolver
from .neumann import Neumann as Neumann
