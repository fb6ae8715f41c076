"""Kernels: ``y = x @ w.T + bias`` for a quantized ``w``, each saying what it can run and why it cannot run the rest.

:mod:`~quantkit.kernels.select` picks one for a :class:`~quantkit.kernels.select.Problem`; every other module of this package
that registers a kernel is found by itself.
"""

from quantkit.kernels.select import KERNELS, ComputeMode, Kernel, Problem, report, select

__all__ = ["KERNELS", "ComputeMode", "Kernel", "Problem", "report", "select"]
