"""Electrons on a line that repel each other: the density that makes its own potential.

In units in which the mass of an electron and Planck's constant over 2 pi are one. Of
the repulsion only its mean is taken, as Hartree did; two electrons are in each state.
"""

import equilax as eqlx
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar


NUM_POINTS = 48
NUM_STATES = 2  # Those that are occupied, of the lowest energies.
STRENGTH = 4.0  # Of the repulsion.
TOLERANCE = 1e-11
_BOUND = 7.0
_WIDTH = 0.7  # Of the bump.

_grid = np.linspace(-_BOUND, _BOUND, NUM_POINTS)
STEP = float(_grid[1] - _grid[0])


class Trap(eqx.Module):
    """The potential from outside: a parabola with a bump in it."""

    frequency: Scalar
    height: Scalar
    position: Scalar

    def __call__(self) -> Float[Array, " points"]:
        x = grid()
        bump = jnp.exp(-(((x - self.position) / _WIDTH) ** 2) / 2)
        return 0.5 * (self.frequency * x) ** 2 + self.height * bump


def trap(frequency: float, height: float, position: float) -> Trap:
    values = np.array([frequency, height, position])
    return Trap(*map(jnp.asarray, values))


def grid() -> Float[Array, " points"]:
    return jnp.asarray(_grid)


def _kinetic() -> np.ndarray:
    """For functions that are sums of sincs (Colbert and Miller 1992).

    Where a state is smooth and ends before the grid does, it is exact but for rounding.
    """
    num = np.arange(NUM_POINTS)
    apart = num[:, None] - num
    square = np.where(apart == 0, 1, apart) ** 2
    signed = np.where(apart % 2 == 0, 1.0, -1.0)
    return signed * np.where(apart == 0, np.pi**2 / 3, 2 / square) / (2 * STEP**2)


def _repulsion() -> np.ndarray:
    """Of two electrons: Coulomb's, softened, as on a line it must be."""
    return STRENGTH / np.sqrt((_grid[:, None] - _grid) ** 2 + 1)


def mean_field(density: Float[Array, " points"]) -> Float[Array, " points"]:
    """The potential that the electrons make."""
    return STEP * jnp.asarray(_repulsion()) @ density


def states(
    potential: Float[Array, " points"],
) -> tuple[Float[Array, " states"], Float[Array, "points states"]]:
    """The energies and the states that are occupied.

    On a line no two bound states have the same energy, so that the derivative, in which
    the differences of all energies are divisors, exists.
    """
    hamiltonian = jnp.asarray(_kinetic()) + jnp.diag(potential)
    energies, vectors = jnp.linalg.eigh(hamiltonian)
    return energies[:NUM_STATES], vectors[:, :NUM_STATES]


def density_of(vectors: Float[Array, "points states"]) -> Float[Array, " points"]:
    return 2 * jnp.sum(vectors**2, axis=1) / STEP


def new_density(density: Float[Array, " points"], trap: Trap):
    """The map whose fixed point is the field: density, potential, states, density."""
    _, vectors = states(trap() + mean_field(density))
    return density_of(vectors)


def start(trap: Trap) -> Float[Array, " points"]:
    """As if there was no repulsion."""
    return density_of(states(trap())[1])


ANDERSON = eqlx.Anderson(rtol=0.0, atol=TOLERANCE)


def solve(
    trap: Trap,
    density: Float[Array, " points"] | None = None,
    solver: eqlx.AbstractFixedPointSolver = ANDERSON,
    max_steps: int = 256,
) -> eqlx.Solution:
    """**Arguments:**

    - `density`: Where to start.
    """
    density = start(trap) if density is None else density
    return eqlx.fixed_point(
        new_density, solver, density, trap, max_steps=max_steps, throw=False
    )


def total_energy(density: Float[Array, " points"], trap: Trap) -> Scalar:
    """Of a density that is its own: repulsion is in the energy of both electrons."""
    field = mean_field(density)
    energies, _ = states(trap() + field)
    return 2 * jnp.sum(energies) - STEP * jnp.sum(field * density) / 2


def extent(density: Float[Array, " points"]) -> Scalar:
    """The mean square of the distance from the middle, of all electrons together."""
    return STEP * jnp.sum(grid() ** 2 * density)
