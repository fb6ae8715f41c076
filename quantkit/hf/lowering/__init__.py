"""Turn a transformers decoder into the operations of kernels.program, or say why that cannot be done."""
