"""The only folder that imports transformers: what a model is made of, how to walk it, how to load it."""
