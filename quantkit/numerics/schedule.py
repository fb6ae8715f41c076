"""How a learning rate changes over the steps."""

_WARM_STEPS = 3


def rise_and_fall(step: int, steps: int) -> float:
    """Return the factor of the learning rate at ``step`` of ``steps``: a short rise, then a straight line to almost zero."""
    return min(1.0, (step + 1) / _WARM_STEPS) * (1 - step / steps)
