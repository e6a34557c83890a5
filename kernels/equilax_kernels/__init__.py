from .spd_solve import spd_solve as spd_solve
