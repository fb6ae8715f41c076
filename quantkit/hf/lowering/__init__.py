"""Convert a transformers decoder to a program of :mod:`quantkit.kernels.program`, or say why that is not possible."""
