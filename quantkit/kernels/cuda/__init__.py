"""Kernels for NVIDIA GPUs, compiled by nvcc on first use and launched through ctypes."""
