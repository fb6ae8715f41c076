"""What a layer does to its inputs before its product, and to its weight so that the two fit: the one place that rounds inputs.

Used by quantized layers at run time, by calibration (which looks at inputs as they will be) and by whoever tries a scheme out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.numerics import grid
from quantkit.numerics.fake import fake_quantize
from quantkit.numerics.hadamard import hadamard_transform
from quantkit.spec import ActivationSpec


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    r"""The inputs of one weight: ``round(prepare_input(x)) @ prepare_weight(w).T`` is close to ``x @ w.T``.

    Preparing is exact but for the last bits: with an orthogonal H, :math:`(x H^T) (W H^T)^T = x W^T`.

    Attributes:
        spec: what inputs are rounded to; None leaves them alone.
        scale: (1,), the stored scale of a static grid; None finds scales from the inputs.
    """

    spec: ActivationSpec | None = None
    scale: Tensor | None = None

    @property
    def rotated(self) -> bool:
        """Whether inputs and weight go through a Hadamard transform."""
        return self.spec is not None and self.spec.rotated

    def prepare_weight(self, weight: Tensor) -> Tensor:
        """Return a weight (..., out, in) as it is stored; float32 if it is rotated."""
        return hadamard_transform(weight.float()) if self.rotated else weight

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Return the weight that inputs want as they are, from one that is stored; undoes :meth:`prepare_weight`."""
        return hadamard_transform(weight, back=True) if self.rotated else weight

    def prepare_input(self, x: Tensor) -> Tensor:
        """Return inputs (..., in) in the basis they are rounded in, in x's dtype; differentiable."""
        return hadamard_transform(x) if self.rotated else x

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid to prepared inputs (..., in), in x's dtype, with the identity's gradient."""
        return x if self.spec is None else fake_quantize(x, self.spec.grid, self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        """Return inputs (..., in) as the product sees them."""
        return self.round(self.prepare_input(x))


UNCHANGED = InputQuantizer()
"""Inputs as they are."""


def static_scale(spec: ActivationSpec, abs_max: Tensor) -> Tensor:
    """Return the scale (..., 1) of a static grid that covers every input seen in calibration.

    Args:
        spec: a static one.
        abs_max: (..., in), the largest magnitude of every channel; an expert that saw no input (zeros) gets the widest scale.
    """
    largest = abs_max.amax(-1, keepdim=True).float().cpu()  # (..., 1)
    largest = torch.where(largest > 0, largest, largest.amax())
    scale, _ = grid.choose_qparams(largest.unsqueeze(-1), spec.grid)
    return scale.squeeze(-1)
