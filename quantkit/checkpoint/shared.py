"""One plan, several formats: which scheme a layer has where, so that all of them hold the same numbers.

Asked before a weight is known, so only what is true of every weight counts
(:func:`~quantkit.checkpoint.regrid.surely_holds`): a float16 scale fits a float32 checkpoint, a symmetric grid is one with the
middle code as its zero points, a group of 128 is four of 32. Zero points, on the other hand, may or may not fit the minimums of
a GGUF file's blocks.
"""

from collections.abc import Iterator, Sequence

from quantkit.checkpoint.check import rejections_in
from quantkit.checkpoint.contents import Contents
from quantkit.checkpoint.regrid import neighbours, surely_holds
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.nn.sites import Site
from quantkit.spec import Plan, Scheme

Shapes = Sequence[tuple[int, ...]]


def shapes_of(contents: Contents, site: Site) -> Shapes:
    """Return the shapes that a layer's weight has in the checkpoint, of each of the tensors that it is cut into."""
    return sorted({entry.weight_shape for entry in contents.entries if entry.site == site})


def refusal(scheme: Scheme, shapes: Shapes, format: str, dtype: str) -> str | None:
    """Say why a format cannot store a layer; None if it can."""
    rule = FORMATS.get(format)
    return next((reason for shape in shapes if (reason := rule.rejects(scheme, shape, dtype))), None)


def accepted(scheme: Scheme, shapes: Shapes, format: str, dtype: str) -> Iterator[Scheme]:
    """Yield the schemes with which a format may hold the numbers of another, the likeliest first."""
    return (one for one in neighbours(scheme, dtype) if refusal(one, shapes, format, dtype) is None)


def same_numbers(scheme: Scheme, shapes: Shapes, format: str, dtype: str) -> Scheme | None:
    """Return the scheme with which a format holds whatever numbers a layer has with ``scheme``; None if there is none."""
    for one in accepted(scheme, shapes, format, dtype):
        if all(surely_holds(scheme.weight, one.weight, shape) for shape in shapes):
            return one
    return None


def holders(scheme: Scheme, shapes: Shapes, dtype: str) -> list[str]:
    """Return the names of the formats that hold a layer's numbers."""
    return [name for name, _ in FORMATS if same_numbers(scheme, shapes, name, dtype) is not None]


def plan_for(contents: Contents, plan: Plan, format: str, dtype: str) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Return the plan with which another format holds the numbers of ``plan``, and the layers whose numbers it does not hold.

    Args:
        contents: what a checkpoint of the model holds.
        plan: layer name to scheme.
        format: name of the other format.
        dtype: dtype of the checkpoint's unquantized weights.
    """
    found: dict[str, Scheme] = {}
    refused: dict[str, str] = {}
    known: dict[tuple[Scheme, tuple[tuple[int, ...], ...]], Scheme | None] = {}
    for name, scheme in plan.items():
        shapes = tuple(shapes_of(contents, contents.sites[name]))
        if (scheme, shapes) not in known:
            known[scheme, shapes] = same_numbers(scheme, shapes, format, dtype)
        if (chosen := known[scheme, shapes]) is not None:
            found[name] = chosen
            continue
        reason = refusal(scheme, shapes, format, dtype) or f"{scheme.describe()} may have numbers that it does not hold"
        refused[name] = f"{reason}; formats that hold these numbers: {', '.join(holders(scheme, shapes, dtype)) or 'none'}"
    return found, refused or rejections_in(contents, found, format, dtype)


def shared_plan(contents: Contents, plan: Plan, format: str, dtype: str) -> dict[str, Scheme]:
    """Return the plan with which another format holds the numbers of ``plan``.

    Raises:
        FormatError: it does not hold those of a layer, whatever they are; the message says which formats do.
    """
    found, refused = plan_for(contents, plan, format, dtype)
    if refused:
        name, reason = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
        half = next(iter(plan.values())).weight.scale_dtype == "bfloat16"
        hint = "; scales in bfloat16 fit few formats: load the model in float16 or float32 (dtype)" if half else ""
        raise FormatError(f"format {format} beside the first output: {name}: {reason}{hint}{more}")
    return found
