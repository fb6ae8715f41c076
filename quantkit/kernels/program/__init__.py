"""One token's way through a decoder as a list of operations: what it is, and plain torch that runs it."""
