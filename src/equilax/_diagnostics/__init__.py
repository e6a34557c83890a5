from .._bounds import ErrorBound as ErrorBound
from .equilibrium_signs import (
    equilibrium_signs as equilibrium_signs,
    EquilibriumSigns as EquilibriumSigns,
)
from .error_bound import error_bound as error_bound
from .iterates import correction_loss as correction_loss, iterates as iterates
from .jacobian_penalty import jacobian_penalty as jacobian_penalty
from .spectral_radius import spectral_radius as spectral_radius
