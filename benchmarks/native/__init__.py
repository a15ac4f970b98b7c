"""Measurements of the native step: its kernels on one checkpoint, without other libraries."""
