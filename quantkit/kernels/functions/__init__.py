"""Compiled inner loops that quantizers, calibration and sampling use; each has a plain torch twin in numerics."""
