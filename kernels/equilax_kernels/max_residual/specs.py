"""The shapes that tests and benchmarks share."""

# Of one sample: a number, a few features, many, an image with channels, nothing.
SHAPES = ((), (1,), (7,), (256,), (3, 8, 8), (0,))
BATCHES = (1, 7, 256)
