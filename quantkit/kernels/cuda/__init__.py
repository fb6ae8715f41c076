"""Kernels for NVIDIA GPUs: compiled by nvcc on first use, launched through ctypes."""
