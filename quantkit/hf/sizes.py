"""Refuse configs whose numbers would fill the memory before anything can be checked.

transformers makes lists and dictionaries while it reads a config: a name for each label, a kind for each layer. A config from
anywhere that says ``num_labels: 1000000000`` would so take a hundred gigabytes, and modules that are built from it far more.
The limits are many times what any published model has; they are checked on the plain values, before transformers sees them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from quantkit.errors import QuantkitError

_LIMITS: tuple[tuple[re.Pattern[str], int, str], ...] = (
    (re.compile(r"(labels|classes)$"), 100_000, "labels"),
    (re.compile(r"(layers?|blocks?|depths?|stages?)$"), 4096, "layers"),
    (re.compile(r"experts?$|experts?_per|group$"), 65_536, "experts"),
    (re.compile(r"position|(ctx|len|length|window)$"), 1 << 27, "positions"),
    (
        re.compile(r"size|dim|(heads?|embd|inner|width|channels|rank|groups|states?|kernel)$|^d_|^num_|^n_"),
        1 << 27,
        "elements",
    ),
)
"""Names of numbers, the largest value, and what they count. The first that fits a name counts."""


def check_sizes(values: Mapping[str, Any], where: str | Path) -> None:
    """Refuse numbers that no model has.

    Args:
        values: what config.json holds, nested configs included.
        where: the file, for messages.

    Raises:
        QuantkitError: naming the number and its limit.
    """
    waiting: list[tuple[str, Any]] = [("", values)]
    for name, value in waiting:  # which grows meanwhile; recursion would be a limit of its own
        match value:
            case Mapping():
                waiting += [(f"{name}.{key}" if name else str(key), one) for key, one in value.items()]
            case list():
                waiting += [(name, one) for one in value]
            case int() | float():
                _check(name, value, where)


def check_config_of(source: str | Path, **options: Any) -> None:
    """Check the config of a directory or hub id before it is read.

    Args:
        source: the directory or hub id.
        **options: of ``from_pretrained``.

    Raises:
        QuantkitError: as :func:`check_sizes`. Errors of transformers pass through.
    """
    values, _ = PretrainedConfig.get_config_dict(source, **options)
    check_sizes(values, f"config.json of {source}")


def _check(name: str, value: float, where: str | Path) -> None:
    last = name.rpartition(".")[2]
    for pattern, limit, what in _LIMITS:
        if pattern.search(last):
            if value > limit:
                raise QuantkitError(
                    f"{where}: {name} is {value:.6g}, more {what} than any model has (at most {limit}); correct its config"
                )
            return
