"""The arithmetic of quantization: dtypes, grids and bit packing, in plain torch."""
