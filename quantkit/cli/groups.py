"""Options that go together: a command has one parameter for all of them, and they are written down once.

A class of options is a frozen dataclass whose fields are annotated as parameters of a command are. A parameter with such a
class as its annotation stands for the options of all fields, in their order; the command gets an object with their values.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, signature
from typing import Any

from quantkit.cli.options import (
    Column,
    ComputeMode,
    Data,
    Device,
    DrafterName,
    Dtype,
    Engine,
    Head,
    KeysAndValues,
    Length,
    MinP,
    RepetitionPenalty,
    Revision,
    Samples,
    Seed,
    Temperature,
    Template,
    TopK,
    TopP,
    TrustRemoteCode,
)


@dataclass(frozen=True)
class Place:
    """Where the weights of a model are, and in which dtype."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Opening:
    """How a model is opened to be run."""

    compute: ComputeMode = "auto"
    head: Head = "float"
    device: Device = "auto"
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Running:
    """What runs a model's steps."""

    kv: KeysAndValues = "float"
    drafter: DrafterName = None
    engine: Engine = "auto"


@dataclass(frozen=True)
class Sampled:
    """How tokens are chosen."""

    temperature: Temperature = 0.0
    top_k: TopK = None
    top_p: TopP = None
    min_p: MinP = None
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Seed = None


@dataclass(frozen=True)
class Text:
    """The text that a model is calibrated with."""

    data: Data = None
    column: Column = None
    template: Template = None
    samples: Samples = 128
    length: Length = 512


def values(group: Any) -> dict[str, Any]:
    """Return the options of a group by name."""
    return {field.name: getattr(group, field.name) for field in fields(group)}


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that has the options of its groups in place of them."""
    known = signature(function)
    groups: dict[str, Any] = {name: one.annotation for name, one in known.parameters.items() if is_dataclass(one.annotation)}
    if not groups:
        return function
    options: list[Parameter] = []
    for name, one in known.parameters.items():
        options += [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(groups[name])
        ] if name in groups else [one.replace(kind=Parameter.KEYWORD_ONLY)]  # fmt: skip

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        made = {name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()}
        return function(**given, **made)

    command.__signature__ = known.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in options} | {"return": None}
    return command
