"""One training step, in one direction: losses, passes, rows, weights, ``.grad``."""
