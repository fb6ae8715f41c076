"""Checkpoint formats: how a quantized tensor becomes named tensors in a file, and how config.json says so."""
