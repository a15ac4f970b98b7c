"""The decode step on a GPU: custom Triton kernels and sampling in one CUDA graph, one step ahead of the token reader.

Triton comes with torch's CUDA builds. If it is missing or the step cannot be built, the model runs in plain torch.
"""
