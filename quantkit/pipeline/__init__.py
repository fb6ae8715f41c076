"""The programs that quantize a model from end to end: plan, walk the blocks, learn, resume, estimate."""
