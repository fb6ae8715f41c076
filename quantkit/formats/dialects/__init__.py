"""Dialects: what ``quantization_config`` says about every weight, and what a dialect has no words for."""
