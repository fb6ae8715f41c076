"""What flows through a model before it is quantized: token batches, statistics of activations, and the block walk."""
