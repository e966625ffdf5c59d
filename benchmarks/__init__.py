"""Measurements of the kernels and of training steps, beside what people use today."""
