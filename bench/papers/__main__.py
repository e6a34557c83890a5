"""Published figures, and ours: all reproductions one after the other.

python -m bench.papers [--plots FOLDER] [--json FILE] [--torch PYTHON]
"""

from . import (
    anderson_is_gmres,
    digits_methods,
    gradient_quality,
    lipschitz_bounds,
    monotone_splitting,
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
    "monotone_splitting": monotone_splitting.run,
    "lipschitz_bounds": lipschitz_bounds.run,
    "reversible_gradient": reversible_gradient.run,
    "digits_methods": digits_methods.RUN,
    "real_equilibrium": real_equilibrium.run,
}


if __name__ == "__main__":
    main(RUNS, __doc__)
