from .base import (
    AbstractAdjoint as AbstractAdjoint,
    Ended as Ended,
    Problem as Problem,
    Run as Run,
)
from .implicit import ImplicitAdjoint as ImplicitAdjoint
from .linear_system import checker as checker, linear_system as linear_system
from .monitor import AdjointMonitor as AdjointMonitor
from .on_failure import OnFailure as OnFailure
from .recursive_checkpoint import (
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
)
from .reversible import ReversibleAdjoint as ReversibleAdjoint
from .rule import AbstractImplicitAdjoint as AbstractImplicitAdjoint
from .shared_inverse import SharedInverseAdjoint as SharedInverseAdjoint
from .transposed import transpose_system as transpose_system
