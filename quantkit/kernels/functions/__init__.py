"""Compiled inner loops of quantizers, calibration and sampling, each with an equivalent in plain torch."""
