"""Kernels for CPUs, compiled by a C++ compiler on first use and called through ctypes."""
