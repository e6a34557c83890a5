from .._fused import (
    AbstractFusedCell as AbstractFusedCell,
    AbstractFusedMap as AbstractFusedMap,
    FusedEnd as FusedEnd,
)
from .adjacency import normalise_adjacency as normalise_adjacency
from .affine_cell import AffineCell as AffineCell
from .affine_map import AffineMap as AffineMap
from .conv_cell import ConvCell as ConvCell
from .fixed_point_layer import FixedPointLayer as FixedPointLayer
from .graph_cell import GraphCell as GraphCell
from .gru_cell import GRUCell as GRUCell
from .mlp_cell import MLPCell as MLPCell
from .multiscale_cell import MultiscaleCell as MultiscaleCell
from .tolerance_schedule import ToleranceSchedule as ToleranceSchedule
from .transformer_cell import TransformerCell as TransformerCell
from .variational_dropout import VariationalDropout as VariationalDropout
from .warm_start import WarmStart as WarmStart
