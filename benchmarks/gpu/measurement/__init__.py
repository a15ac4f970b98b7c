"""The measurements of the GPU benchmark."""
