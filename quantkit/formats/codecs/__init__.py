"""Codecs: exact mappings between a QTensor and the tensors that stand for it in a file."""
