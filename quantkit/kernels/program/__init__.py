"""Decoder programs: a description of a decoder as a list of operations, and an implementation in plain torch."""
