"""Kernels for CPUs: compiled by the C++ compiler on first use, called through ctypes."""
