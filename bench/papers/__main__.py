"""Published figures, and ours: all reproductions one after the other.

python -m bench.papers [--plots FOLDER] [--json FILE]
"""

from . import (
    anderson_is_gmres,
    gradient_quality,
    real_equilibrium,
    reversible_gradient,
    safeguarded_type_i,
    squarem_poisson,
)
from .report import main


RUNS = {
    "anderson_is_gmres": anderson_is_gmres.run,
    "squarem_poisson": squarem_poisson.run,
    "safeguarded_type_i": safeguarded_type_i.run,
    "gradient_quality": gradient_quality.run,
    "reversible_gradient": reversible_gradient.run,
    "real_equilibrium": real_equilibrium.run,
}


if __name__ == "__main__":
    main(RUNS, __doc__)
