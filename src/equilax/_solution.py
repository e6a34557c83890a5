import warnings
from typing import Any, Generic

import equinox as eqx
import lineax as lx
from jaxtyping import Array, PyTree

from ._custom_types import Aux, Y


# Extends Lineax's, so that the result of a linear solve is one of these as well. Two of
# the names stand there already, with messages on linear solves: replacing a message is
# what Equinox warns about here.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    class RESULTS(lx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
        r"""How a solve ended: one item per sample, each the name of one inequality.

        With $r_k$ the `norm` of $f(y_k) - y_k$ after `k` steps, and $s_k$ that of
        $(f(y_k) - y_k) / (\mathrm{atol} + \mathrm{rtol} |y_k|)$:

        - `successful`: $s_k < 1$ at the value returned. With both tolerances zero a
            solve is a number of steps to be taken, and taking them all is a success, or
            fewer if nothing moves any more.
        - `max_steps_reached`: $k =$ `max_steps` and $s_k \geq 1$.
        - `nonfinite`: $f(y_k)$ is infinite or not a number, and the solver has no way
            back from $y_k$. The value is $y_k$; that of any other failure is the
            iterate of the smallest $r_k$.
        - `divergence`: $r_k > 10^8 r_0$.
        - `stagnation`: no new smallest $r_k$ for 30 steps with $r_k$ at the level of
            rounding, or for 1,000 steps anywhere.

        The remaining items are those of [`lineax.RESULTS`][].
        """

        successful = ""
        max_steps_reached = (
            "The solver reached `max_steps` before its tolerance. Raise `max_steps`, "
            "loosen `rtol` and `atol`, or take a solver that accelerates, such as "
            "`equilax.Anderson`."
        )
        nonfinite = (
            "`fn` returned an infinity or a NaN during the solve. The value is the "
            "last iterate that was finite."
        )
        divergence = (
            "The residual grew by a factor of 1e8. The iteration does not contract "
            "from this start; a solver that accelerates may converge."
        )
        stagnation = (
            "The residual stopped falling above the tolerance. The tolerance may be "
            "below what the dtype can resolve."
        )


class Solution(eqx.Module, Generic[Y, Aux]):
    """The solution of a fixed-point solve.

    **Attributes:**

    - `value`: The fixed point `y`, with the structure, shapes and dtypes of `y0`. Of a
        solve that failed, the best iterate.
    - `result`: An [`equilax.RESULTS`][] item, per sample under `vmap`.
    - `aux`: The auxiliary output of `fn` at `value`, or `None`.
    - `stats`: A dictionary with
        `num_steps` (updates of `y`, int32),
        `num_fn_evals` (evaluations of `fn`, int32; one more than the steps for a solver
        that needs one a step, since the value returned has been tested),
        `max_steps` (int),
        `residual` (the norm of `fn(y) - y` at `value`, in the units of `y`),
        and whatever the solver documents in addition.
    - `state`: The final state of the solver, for the `state` of the next solve.
    """

    value: Y
    result: RESULTS
    aux: Aux
    stats: dict[str, PyTree[Array | int]]
    state: Any
