r"""What a transform is: factors that move size between a layer's input channels and its weights.

For any positive s, :math:`W x = (W \operatorname{diag}(s)) (\operatorname{diag}(s)^{-1} x)`. If whatever produces x (a norm's
weight, the rows of another linear layer) can take up :math:`1/s`, the model computes what it computed before, but weights and
activations have other sizes, and so other rounding errors. A transform only says which s it wants, from the weights that read x
and from statistics; :mod:`quantkit.transforms.scaling_groups` finds the places where that is allowed, and carries it out.

Factors are rounded to powers of two, so that nothing is rounded when they are multiplied in, whatever the model's dtype.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quantkit.errors import SpecError
from quantkit.registry import Registry
from quantkit.spec import Scheme


class Statistics(Protocol):
    """What calibration knows about the input of a group of sites."""

    results: dict[str, Tensor]


class Transform(Protocol):
    """Chooses a factor for every input channel of the sites that read one tensor.

    A member is a frozen dataclass whose fields are its options.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the collectors it wants."""

    def factors(self, weights: Sequence[Tensor], schemes: Sequence[Scheme], statistics: Statistics) -> Tensor:
        """Return s, positive float32 (in,); 1 leaves a channel as it is.

        Args:
            weights: float32 (out_i, in) of every site that reads the tensor.
            schemes: how each of them will be quantized.
            statistics: results of :attr:`needs` for the tensor.
        """


TRANSFORMS: Registry[type[Transform]] = Registry("transform", package="quantkit.transforms", error=SpecError)
