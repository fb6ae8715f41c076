"""quantkit: quantize a language model, prove the checkpoint, measure it, ship it."""

__version__ = "0.1.0"
