"""Workloads: small multi-task problems on real data, one module for each way to share parameters.

Every one is trained by the same loop through `MultiTaskOptimizer`. `registry` finds them by name.
"""
