"""A scheme in a file of its own: 5-bit weights with a scale for every 16 input channels, 8 where 16 does not divide.

An installed package names it in ``[project.entry-points."quantkit.schemes"]``: ``w5a16-fine = "outside_scheme:fine"``.
"""

from collections.abc import Sequence

from quantkit.spec import QuantSpec, Scheme


def fine(in_features: Sequence[int], scale_dtype: str) -> Scheme:
    """Return the scheme for layers of these input sizes."""
    group = 16 if all(size % 16 == 0 for size in in_features) else 8
    return Scheme(QuantSpec("int5", (1, group), symmetric=False, scale_dtype=scale_dtype))
