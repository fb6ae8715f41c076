"""Sweeps: calibrate once, quantize many times, score everything on the same tokens, and show what is worth its bytes."""
