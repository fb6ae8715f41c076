"""Text generation with a model: tokenization, stop strings and streaming around the engine."""
