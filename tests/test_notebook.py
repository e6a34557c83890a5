import re
import runpy
from pathlib import Path

import jax


_PATH = Path(__file__).parent.parent / "examples" / "notebook.py"


def test_the_notebook_told_again_meets_what_was_printed(capsys):
    # Told in single precision under JAX's defaults, as it was then.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        runpy.run_path(str(_PATH), run_name="__main__")
    out = capsys.readouterr().out
    pattern = r"largest difference to what was (.*): (.*)"
    differences = re.findall(pattern, out)
    assert len(differences) == 8
    for against, difference in differences:
        # What was computed twice here differs by the tolerance of the iteration.
        assert float(difference) < (1e-6 if "printed" in against else 5e-6)
