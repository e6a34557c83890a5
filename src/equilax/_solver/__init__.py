from .aitken import Aitken as Aitken
from .alternating_anderson import AlternatingAnderson as AlternatingAnderson
from .anderson import Anderson as Anderson
from .anderson_type_i import AndersonTypeI as AndersonTypeI
from .auto import Auto as Auto
from .bad_broyden import BadBroyden as BadBroyden
from .base import (
    AbstractFixedPointSolver as AbstractFixedPointSolver,
    Evaluation as Evaluation,
    Step as Step,
)
from .best_so_far import BestSoFar as BestSoFar
from .broyden import Broyden as Broyden
from .fixed_point_iteration import FixedPointIteration as FixedPointIteration
from .inverse_estimate import AbstractInverseEstimate as AbstractInverseEstimate
from .iterate import iterate as iterate, make_loop as make_loop
from .line_search import (
    AbstractLineSearch as AbstractLineSearch,
    Backtracking as Backtracking,
    FullStep as FullStep,
)
from .newton import Newton as Newton
from .newton_krylov import NewtonKrylov as NewtonKrylov
from .progress import Progress as Progress
from .rejections import Rejections as Rejections
from .reversible import Reversible as Reversible, Way as Way
from .squarem import Squarem as Squarem
from .traced import Traced as Traced
from .up_to import UpTo as UpTo
from .warm_start import check_solver_state as check_solver_state
from .wrapper import unwrapped as unwrapped
