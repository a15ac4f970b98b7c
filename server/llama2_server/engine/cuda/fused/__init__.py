"""A decode step of fewer kernels, which overlap: off by default, because no whole step has run on a GPU.

Consecutive kernels use programmatic dependent launch on compute capability 9.0 and newer. Two rules keep that safe:

1. Before its wait, a kernel reads only constant weights. It writes no memory.
2. Every program of a kernel waits. So after its wait all earlier kernels of the step have ended, not only the last one,
   and it may write a buffer that any of them has read.
"""
