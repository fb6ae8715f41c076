"""What ``quantkit plan --serve`` shows: weights, keys and values, and time per token on this machine."""

import dataclasses
from pathlib import Path
from typing import Any

from quantkit.cli.console import facts, print_json, size, table
from quantkit.errors import QuantkitError

COMPARED = ("w8a16", "w4a16-asym")
"""Schemes that a float model is compared with where none is named."""
CONTEXTS, USERS = (2048, 8192, 32768), (1, 8)


def show_fits(
    place: str, planned: Any, contexts: list[int] | None, users: list[int] | None, *, kv: str, device: str, as_json: bool
) -> None:
    """Print what fits this machine.

    Args:
        place: a quantized checkpoint, or what the plans are of.
        planned: label to a preview (:func:`quantkit.recipe.run.plan_recipe`); None for a checkpoint.
        contexts, users: of the table; None for those that the model can have.
        kv: how keys and values are stored.
        device: where the model is to run.
        as_json: print JSON.
    """
    from quantkit.checkpoint.read import open_checkpoint
    from quantkit.hf.paged import context_tokens
    from quantkit.pipeline.serving import Machine, serving_table, weights_of

    if planned is None:
        with open_checkpoint(place) as opened:
            contents = opened.contents
            weights = [weights_of(contents, opened.schemes, opened.format_name, Path(place).name)]
    else:
        first = next(iter(planned.values()))
        contents, format = first.contents, first.recipe.output.format
        weights = [weights_of(contents, {}, format, str(contents.model.dtype).removeprefix("torch."))]
        weights += [weights_of(contents, one.resolution.plan, format, label) for label, one in planned.items()]
    longest = context_tokens(contents.model)
    if contexts and longest and max(contexts) > longest:
        raise QuantkitError(f"--context {max(contexts)}: the model takes {longest} tokens at most")
    lengths = contexts or [one for one in CONTEXTS if longest is None or one <= longest] or [longest or CONTEXTS[0]]
    machine = Machine.measure([one.total for one in weights], device)
    rows = serving_table(contents, weights, machine, contexts=lengths, users=users or USERS, kv=kv)
    if as_json:
        print_json({"machine": dataclasses.asdict(machine), "rows": [dataclasses.asdict(row) for row in rows]})
        return
    fits = {True: "yes", False: "no", None: "unknown"}
    cells = [
        (row.weights, f"{row.context:,}", str(row.users), size(row.weight_bytes), size(row.kv_bytes), size(row.memory_bytes),
         fits[row.fits], f"{row.ms:.2f}", f"{row.tokens_per_s:.0f}")
        for row in rows
    ]  # fmt: skip
    heads = ("weights", "context", "users", "weights take", "keys and values", "memory", "fits", "ms per token", "tokens/s")
    table(f"{place}: what fits, with {kv} keys and values", heads, cells)
    read = ", ".join(f"{speed / 1e9:.1f} GB/s (of {size(probe)})" for probe, speed in machine.bandwidths.items())
    available = "unknown" if machine.available is None else f"{size(machine.available)} available"
    facts(
        {
            "machine": f"{machine.device}, {available}",
            "read, measured": read,
            "times": "of reading alone: the least a step can take; many users and prompts wait for arithmetic",
        }
    )
