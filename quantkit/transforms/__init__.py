"""Transforms: rewrite a float model so that it computes the same and quantizes better. One file adds one."""
