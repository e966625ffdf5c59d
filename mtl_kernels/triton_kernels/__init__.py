"""Triton kernels, one file each with its launcher; imported only when the `triton` backend is asked for."""
