"""The inference engine: continuous batching, paged keys and values, sampling and drafting, on token ids.

It knows torch, but no model class and no tokenizer: a model is a :class:`~quantkit.engine.backend.Backend`.
"""
