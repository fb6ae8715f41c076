r"""What calibration remembers about the inputs of a layer.

Every collector sees rows ``x`` of shape (tokens, in) and has three promises: the result does not depend on how the rows
were split into updates, ``merge`` of two collectors equals one that saw both inputs (up to floating-point summation order),
and its state is a dictionary of tensors, so that it can be written to a file and continued. Padding never reaches a
collector: sequences are run without it.

A member of the family registers itself with ``@COLLECTORS.register(name)``; quantizers and transforms name what they need.
"""

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.kernels.functions.moment import add_moment
from quantkit.registry import Registry


class Collector(Protocol):
    """Accumulates a statistic over rows of activations; ``state`` holds everything, as tensors.

    A member derives from this class or declares :attr:`paired` itself.

    Attributes:
        paired: rows are twice as wide: each as a layer sees it behind quantized ones and, beside it, as the float model has it.
        guided: rows have been multiplied by the root of how much their tokens count (:mod:`quantkit.calibrate.guidance`).
        joined: how states of several processes become one: all their tensors are added, or the largest values taken; None if
            several processes cannot collect it together. A sum is one of terms x_i x_j, x_i^2 or x_i of rows x.
    """

    paired: ClassVar[bool] = False
    guided: ClassVar[bool] = False
    joined: ClassVar[Literal["sum", "maximum"] | None] = None
    state: dict[str, Tensor]

    def __init__(self, features: int) -> None: ...

    def update(self, x: Tensor) -> None:
        """Add rows ``x`` (tokens, features), any floating dtype."""

    def result(self) -> Tensor:
        """Return the statistic."""

    def merge(self, other: "Collector") -> None:
        """Add what ``other`` (same kind, same features) has seen."""


COLLECTORS: Registry[type[Collector]] = Registry("collector", package="quantkit.calibrate", error=CalibrationError)


_STRIP = 1024
"""Rows of a matrix that are mirrored at a time."""


class _Sum(Collector, Protocol):
    """Base of collectors whose state is a sum over rows and the number of rows."""

    joined: ClassVar[Literal["sum", "maximum"] | None] = "sum"

    def merge(self, other: Collector) -> None:
        """Add the other sums and counts."""
        for name, value in other.state.items():
            self.state[name] = self.state[name].to(value.device) + value

    def _mean(self, name: str) -> Tensor:
        count = self.state["count"]
        if int(count) == 0:
            raise CalibrationError("no activations were collected: the layer was never called during calibration")
        return self.state[name] / count.to(self.state[name])


@COLLECTORS.register("mean_square")
class MeanSquare(_Sum):
    """Second moment of every input channel, E[x^2]: float64 (features,)."""

    def __init__(self, features: int) -> None:
        self.state = {"sum": torch.zeros(features, dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, x: Tensor) -> None:
        """Add the squares of ``x`` (tokens, features)."""
        self.state["sum"] = self.state["sum"].to(x.device) + x.double().square().sum(0)
        self.state["count"] += x.shape[0]

    def result(self) -> Tensor:
        """Return E[x^2]."""
        return self._mean("sum")


@COLLECTORS.register("mean")
class Mean(_Sum):
    """Mean of every input channel, E[x]: float64 (features,)."""

    def __init__(self, features: int) -> None:
        self.state = {"sum": torch.zeros(features, dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, x: Tensor) -> None:
        """Add the rows of ``x`` (tokens, features)."""
        self.state["sum"] = self.state["sum"].to(x.device) + x.double().sum(0)
        self.state["count"] += x.shape[0]

    def result(self) -> Tensor:
        """Return E[x]."""
        return self._mean("sum")


@COLLECTORS.register("hessian")
class Hessian(_Sum):
    """Second-moment matrix E[x x^T]: float32 (features, features), accumulated in float32.

    It is half the Hessian of the layer's squared output error (Frantar et al. 2022, arXiv 2210.17323, section 3).
    """

    def __init__(self, features: int) -> None:
        self.state = {"sum": torch.zeros(features, features), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, x: Tensor) -> None:
        """Add ``x^T x`` for ``x`` (tokens, features)."""
        total = self.state["sum"] = self.state["sum"].to(x.device)
        add_moment(total, x, x)
        self.state["count"] += x.shape[0]

    def result(self) -> Tensor:
        """Return E[x x^T], symmetric."""
        whole = self._mean("sum")
        for start in range(0, len(whole), _STRIP):  # in place: the matrix of a wide layer is as large as its block
            strip = slice(start, start + _STRIP)
            whole[strip, strip] = whole[strip, strip].triu() + whole[strip, strip].triu(1).T
            whole[strip.stop :, strip] = whole[strip, strip.stop :].T
        return whole


@COLLECTORS.register("drift")
class Drift(_Sum):
    """How the inputs of a layer have moved away from the float model's: E[(x' - x) x^T], float32 (features, features).

    x is a row as the layer sees it behind quantized layers, x' the same row in the float model. Rows come as pairs, [x, x']
    side by side: (tokens, 2 features).
    """

    paired: ClassVar[bool] = True

    def __init__(self, features: int) -> None:
        self.state = {"sum": torch.zeros(features, features), "count": torch.zeros((), dtype=torch.int64)}

    def update(self, x: Tensor) -> None:
        """Add ``(x' - x)^T x`` for rows ``[x, x']`` (tokens, 2 features)."""
        own, float_x = x.chunk(2, 1)
        total = self.state["sum"] = self.state["sum"].to(x.device)
        add_moment(total, (float_x.float() - own.float()).to(x.dtype), own)
        self.state["count"] += x.shape[0]

    def result(self) -> Tensor:
        """Return E[(x' - x) x^T]."""
        return self._mean("sum")


@COLLECTORS.register("guided_hessian")
class GuidedHessian(Hessian):
    """Second-moment matrix in which tokens count as much as the predictions care, E[w x x^T]: float32 (features, features).

    (Kim et al. 2025, GuidedQuant, arXiv 2505.07004; see :mod:`quantkit.calibrate.guidance`.)
    """

    guided: ClassVar[bool] = True
    joined: ClassVar[Literal["sum", "maximum"] | None] = None  # the backward pass before it runs over all text


@COLLECTORS.register("guided_drift")
class GuidedDrift(Drift):
    """Drift in which tokens count as much as the predictions care, E[w (x' - x) x^T]: float32 (features, features)."""

    guided: ClassVar[bool] = True
    joined: ClassVar[Literal["sum", "maximum"] | None] = None


@COLLECTORS.register("abs_max")
class AbsMax(Collector):
    """Largest magnitude of every input channel: float32 (features,)."""

    joined: ClassVar[Literal["sum", "maximum"] | None] = "maximum"

    def __init__(self, features: int) -> None:
        self.state = {"max": torch.zeros(features)}

    def update(self, x: Tensor) -> None:
        """Take ``x`` (tokens, features) into account."""
        if x.shape[0]:
            self.state["max"] = torch.maximum(self.state["max"].to(x.device), x.abs().amax(0).float())

    def result(self) -> Tensor:
        """Return max |x|."""
        return self.state["max"]

    def merge(self, other: Collector) -> None:
        """Take the larger of both maxima."""
        self.state["max"] = torch.maximum(self.state["max"].to(other.state["max"].device), other.state["max"])


@COLLECTORS.register("samples")
class Samples(Collector):
    """A random sample of at most :attr:`ROWS` input rows, kept as they are: (rows, features).

    The rows with the smallest hash of their own content are kept (bottom-k sampling), which makes the sample independent
    of order and split; identical rows count once.
    """

    ROWS = 512

    def __init__(self, features: int) -> None:
        self.state = {"rows": torch.zeros(0, features), "keys": torch.zeros(0, dtype=torch.int64)}

    def update(self, x: Tensor) -> None:
        """Offer the rows of ``x`` (tokens, features)."""
        rows = x.float()
        bits = rows.contiguous().view(torch.int32).long()
        generator = torch.Generator().manual_seed(0x5EED)
        factors = torch.randint(1 << 62, (bits.shape[1],), generator=generator) | 1
        keys = (bits * factors.to(bits.device)).sum(1)  # wraps around: an exact, order-free integer hash
        keys = (keys ^ (keys >> 29)) * 0x5851F42D4C957F2D
        self._keep(rows, keys ^ (keys >> 32))

    def result(self) -> Tensor:
        """Return the kept rows, ordered by hash."""
        return self.state["rows"]

    def merge(self, other: Collector) -> None:
        """Keep the smallest hashes of both samples."""
        self._keep(other.state["rows"], other.state["keys"])

    def _keep(self, rows: Tensor, keys: Tensor) -> None:
        rows = torch.cat([self.state["rows"].to(rows.device), rows])
        keys, order = torch.cat([self.state["keys"].to(keys.device), keys]).sort(stable=True)
        fresh = torch.ones_like(keys, dtype=torch.bool)
        fresh[1:] = keys[1:] != keys[:-1]
        order = order[fresh][: self.ROWS]
        self.state = {"rows": rows[order], "keys": keys[fresh][: self.ROWS]}
