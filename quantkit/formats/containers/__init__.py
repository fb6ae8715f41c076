"""Containers: files that hold named tensors and a config."""
