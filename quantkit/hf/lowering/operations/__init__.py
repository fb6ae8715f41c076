"""What each torch operation means for the elements of a token; see :mod:`quantkit.hf.lowering.record`."""
