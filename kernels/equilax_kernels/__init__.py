from ._dispatch import on_platform as on_platform
from .affine_fixed_point import (
    affine_fixed_point as affine_fixed_point,
    affine_kernels as affine_kernels,
    RowSolution as RowSolution,
    Status as Status,
)
from .max_residual import max_residual as max_residual
from .spd_solve import spd_solve as spd_solve
