import enum


class OnFailure(enum.Enum):
    """What becomes of the derivative of a sample whose backward pass failed.

    Only with `throw=False`: with `throw=True` it raises. No other sample is affected.

    - `nan`: Not a number. Cannot be overlooked, and spoils what it is added to.
    - `zero`: Zero. The sample is left out of a gradient. Count the samples that are,
        by an [`equilax.AdjointMonitor`][].
    - `keep`: As it came out of that pass, for what it is worth. Where that is not
        finite, zero.
    """

    nan = "nan"
    zero = "zero"
    keep = "keep"
