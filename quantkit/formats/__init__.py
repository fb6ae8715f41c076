"""Checkpoint formats: how a quantized tensor becomes named tensors in files, and how the config says so.

A format is put together from three parts that know nothing of each other:

- a codec (:mod:`quantkit.formats.codecs`) turns one GridTensor into a few plain tensors and back, exactly;
- a container (:mod:`quantkit.formats.containers`) keeps named tensors and a config in files, and writes them as they come;
- a dialect (:mod:`quantkit.formats.dialects`) says in the config how each weight is stored, and what cannot be stored.
"""
