from .affine_fixed_point import affine_fixed_point as affine_fixed_point
from .max_residual import max_residual as max_residual
from .spd_solve import spd_solve as spd_solve
