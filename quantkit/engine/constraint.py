"""What an answer may consist of, such as JSON of some schema: asked before every token, told every token.

The engine knows no grammar. It asks the constraint of a request which tokens may come next, sets the logits of all others to
-inf before a token is chosen, and tells it the token. Draft tokens are cut off before the first that is not allowed, and the
rows that verify the others are constrained as if these had been accepted, so answers do not depend on drafts.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.errors import QuantkitError


class Constraint(Protocol):
    """Restricts the tokens of one answer. Only the engine's thread uses it after the request has been submitted."""

    @property
    def error(self) -> QuantkitError | None:
        """Why no token is allowed any more, if the constraint itself has failed; else None."""
        ...

    def fitting(self, drafts: Sequence[int]) -> int:
        """Return how many of ``drafts``, from the first one on, may come next."""
        ...

    def allowed(self, drafts: Sequence[int]) -> NDArray[np.uint8]:
        """Return the tokens that may come next, and those that may come after each of ``drafts``.

        Args:
            drafts: tokens that may come next, as :meth:`fitting` says; none of them becomes part of the answer by this call.

        Returns:
            uint8 (1 + len(drafts), bytes), one bit per token id, least significant first, 1 for allowed; ids beyond are not.
        """
        ...

    def accept(self, token: int) -> bool:
        """Add a token to the answer. Return whether the answer is complete, so that nothing may follow."""
        ...


def forbid(logits: Tensor, bits: NDArray[np.uint8]) -> Tensor:
    """Return the logits with -inf for tokens that are not allowed.

    Args:
        logits: floating (rows, V).
        bits: uint8 (rows, bytes), as :meth:`Constraint.allowed` returns them.

    Returns:
        A new tensor (rows, V).
    """
    allowed = np.unpackbits(bits, axis=1, bitorder="little", count=logits.shape[1]).astype(bool)  # cuts, or fills with zeros
    return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))
