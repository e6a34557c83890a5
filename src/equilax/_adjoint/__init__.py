from .base import AbstractAdjoint as AbstractAdjoint, Problem as Problem
from .implicit import ImplicitAdjoint as ImplicitAdjoint
from .recursive_checkpoint import (
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
)
