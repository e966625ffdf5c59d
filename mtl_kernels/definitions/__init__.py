"""What every operation computes, in plain PyTorch: written to be read, and the oracle of everything that is fast.

It may wait for the device. Nothing here knows the operations, backends or solvers that stand on it: a solver's file
registers its definition, see `solving.defines`.
"""
