"""Quantizers: how the codes of a weight are chosen. One file adds one."""
