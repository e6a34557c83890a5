"""Faults put into the code on purpose, each of which some test must find.

`python -m tests.mutations` puts in one after the other, in a copy of the tree, and runs
the tests that are named for it: about twenty seconds each.
"""

from .core import CORE
from .kernels import KERNELS
from .told import TOLD


ALL = KERNELS + CORE + TOLD
