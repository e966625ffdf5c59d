"""What the network of the demo is trained for."""

TASKS = {"top-left": 10, "bottom-right": 10, "digit-sum": 19}
"""The tasks and their numbers of classes."""
