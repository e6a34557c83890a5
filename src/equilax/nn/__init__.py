from .._fused import (
    AbstractFusedCell as AbstractFusedCell,
    AbstractFusedMap as AbstractFusedMap,
    FusedEnd as FusedEnd,
)
from .affine_cell import AffineCell as AffineCell
from .affine_map import AffineMap as AffineMap
from .fixed_point_layer import FixedPointLayer as FixedPointLayer
from .tolerance_schedule import ToleranceSchedule as ToleranceSchedule
from .warm_start import WarmStart as WarmStart
