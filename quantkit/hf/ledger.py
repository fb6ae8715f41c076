"""What is known of a source's tensors: which part of a model each fills, and which are carried over as they are.

The account is made by :mod:`quantkit.hf.account` and goes with the model that was loaded, so that everything that counts or
writes the model's tensors counts and writes those, too, that its class does not know.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import FormatError
from quantkit.formats.containers.base import Header
from quantkit.hf.weight_files import Weights

_ATTRIBUTE = "quantkit_ledger"


@dataclass(frozen=True, eq=False)
class Ledger:
    """The tensors of a source, each accounted for once.

    Attributes:
        path: the directory.
        headers: every tensor's file, dtype and shape, by its name in the files.
        fills: parameter or buffer of the model to the tensors that it consists of.
        carried: names of the tensors that no parameter consists of, in order.
        open: opens the files.
        is_source: whether ``path`` is a float model's directory, whose other files (tokenizer, processor, licence) go with it.
        trusts_code: whether its Python files are among them.
    """

    path: Path
    headers: Mapping[str, Header]
    fills: Mapping[str, tuple[str, ...]]
    carried: tuple[str, ...]
    open: Callable[[], AbstractContextManager[Weights]] = field(repr=False)
    is_source: bool = True
    trusts_code: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ledger":
        return self

    @property
    def carried_headers(self) -> dict[str, Header]:
        """Headers of the tensors that are carried over, by name."""
        return {name: self.headers[name] for name in self.carried}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(header.nbytes for header in self.headers.values())

    def source_dtype(self, parameter: str) -> torch.dtype | None:
        """Return the dtype in which the source holds a parameter; None if the source does not hold it."""
        names = self.fills.get(parameter)
        return self.headers[names[0]].dtype if names else None

    def stored_twice(self, name: str, other: str) -> bool:
        """Say whether the source holds two tensors for two names that the model ties."""
        return name in self.fills and other in self.fills and not set(self.fills[name]) & set(self.fills[other])

    @contextmanager
    def tensors(self) -> Iterator[Callable[[str], Tensor]]:
        """Open the files; yields a function that returns the data of one tensor by its name.

        Raises:
            FormatError: the files are gone or have changed.
        """
        if not self.carried:
            yield _nothing
            return
        with self.open() as opened:
            for name, header in self.carried_headers.items():
                found = opened.headers.get(name)
                if found is None or (found.dtype, found.shape) != (header.dtype, header.shape):
                    raise FormatError(
                        f"{self.path}: {name}, which is to be carried over, is no longer what it was; leave the source in "
                        "place until the checkpoint is written"
                    )
            yield opened.read


def _nothing(name: str) -> Tensor:
    raise FormatError(f"{name} is not a tensor that is carried over")


def ledger_of(model: nn.Module) -> Ledger | None:
    """Return the account of the files that a model was loaded from; None for a model that was made otherwise."""
    found: Ledger | None = vars(model).get(_ATTRIBUTE)
    return found


def keep_ledger(model: nn.Module, ledger: Ledger) -> None:
    """Remember with a model what its source holds."""
    vars(model)[_ATTRIBUTE] = ledger
