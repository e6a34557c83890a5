"""The shapes that tests and benchmarks share."""

# History lengths of Anderson acceleration, from the smallest to more than anyone takes.
SIZES = (1, 2, 3, 5, 8, 12)
BATCHES = (1, 7, 256)
