"""Where weights live in a model, and the modules that run quantized ones."""
