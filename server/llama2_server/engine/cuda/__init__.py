"""The decode step on a GPU: our own kernels and the sampling in one CUDA graph, one step ahead of who reads the tokens.

Triton comes with torch's CUDA builds. Where it is missing, or the step cannot be built, the model runs in plain torch.
"""
