from .._fused import (
    AbstractFusedCell as AbstractFusedCell,
    AbstractFusedMap as AbstractFusedMap,
    FusedEnd as FusedEnd,
)
from .affine_cell import AffineCell as AffineCell
from .contractive_linear import ContractiveLinear as ContractiveLinear
from .fixed_point_layer import FixedPointLayer as FixedPointLayer
from .forward_backward import ForwardBackward as ForwardBackward
from .lipschitz_bounded_layer import LipschitzBoundedLayer as LipschitzBoundedLayer
from .monotone_conv import MonotoneConv as MonotoneConv
from .monotone_layer import MonotoneLayer as MonotoneLayer
from .monotone_linear import MonotoneLinear as MonotoneLinear
from .peaceman_rachford import PeacemanRachford as PeacemanRachford
from .positive_concave_cell import PositiveConcaveCell as PositiveConcaveCell
