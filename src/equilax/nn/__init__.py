from .._fused import (
    AbstractFusedCell as AbstractFusedCell,
    AbstractFusedMap as AbstractFusedMap,
    FusedEnd as FusedEnd,
)
from .adjacency import normalise_adjacency as normalise_adjacency
from .affine_cell import AffineCell as AffineCell
from .affine_map import AffineMap as AffineMap
from .contractive_linear import ContractiveLinear as ContractiveLinear
from .conv_cell import ConvCell as ConvCell
from .fixed_point_layer import FixedPointLayer as FixedPointLayer
from .forward_backward import ForwardBackward as ForwardBackward
from .graph_cell import GraphCell as GraphCell
from .gru_cell import GRUCell as GRUCell
from .lipschitz_bounded_layer import LipschitzBoundedLayer as LipschitzBoundedLayer
from .mlp_cell import MLPCell as MLPCell
from .monotone_conv import MonotoneConv as MonotoneConv
from .monotone_layer import MonotoneLayer as MonotoneLayer
from .monotone_linear import MonotoneLinear as MonotoneLinear
from .multiscale_cell import MultiscaleCell as MultiscaleCell
from .parametrisation import (
    AbstractParametrisation as AbstractParametrisation,
    AbstractStatefulParametrisation as AbstractStatefulParametrisation,
    prepare as prepare,
    prepare_with_state as prepare_with_state,
)
from .peaceman_rachford import PeacemanRachford as PeacemanRachford
from .positive_concave_cell import PositiveConcaveCell as PositiveConcaveCell
from .spectral_norm import SpectralNorm as SpectralNorm
from .tolerance_schedule import ToleranceSchedule as ToleranceSchedule
from .transformer_cell import TransformerCell as TransformerCell
from .variational_dropout import VariationalDropout as VariationalDropout
from .warm_start import WarmStart as WarmStart
from .weight_norm import WeightNorm as WeightNorm
