"""Codecs: exact mappings between a GridTensor and the tensors that stand for it in a file."""
