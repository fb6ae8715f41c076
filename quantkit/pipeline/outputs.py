"""One calibration, several formats: the further checkpoints of a run, made of the first one number for number.

The first output is written as blocks are quantized, and continued after a kill. When it is whole, each of the others is
decoded from it and encoded anew (:mod:`quantkit.pipeline.reformat`), compared bit for bit, loaded, and its predictions are
compared with those of the model in memory; then it gets its name. A run that is given again goes on with the first that is not
whole.

What every format can hold is asked before any long work (:mod:`quantkit.checkpoint.shared`).
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit import checkpoint
from quantkit.checkpoint.check import config_of, dtype_name
from quantkit.checkpoint.contents import contents_of
from quantkit.checkpoint.reformat import open_source
from quantkit.checkpoint.shared import shared_plan
from quantkit.evaluation.sanity import SanityCheck
from quantkit.hf.load import PreTrainedModel
from quantkit.pipeline.again import is_done
from quantkit.pipeline.reformat import convert
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.settings import Output
from quantkit.spec import Plan

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(output: Output, doing: str) -> Iterator[None]:
    """Be the only one who writes to any of the outputs; see :func:`quantkit.checkpoint.claim`."""
    with contextlib.ExitStack() as stack:
        for one in output.all:
            stack.enter_context(checkpoint.claim(one.path, doing))
        yield


def check_others(
    output: Output, model: PreTrainedModel, plan: Plan, key: checkpoint.Key | None, tokenizer: Any, *, resume: bool
) -> None:
    """Make sure that what goes with the first output can be written.

    Args:
        output: all outputs.
        model: the model, float.
        plan: of the first output.
        key: of the run that writes it.
        tokenizer: of the model.
        resume: go on with what an earlier run left there.

    Raises:
        FormatError: a format does not hold the numbers of the plan; see also :func:`quantkit.checkpoint.check_output`.
    """
    if not output.also:
        return
    contents, dtype = contents_of(config_of(model)), dtype_name(model)
    for one in output.also:
        mine = shared_plan(contents, plan, one.format, dtype)
        own = key_beside(key, one)
        if own is not None and resume and is_done(Path(str(one.path)), own, overwrite=one.overwrite):
            continue
        checkpoint.check_output(
            str(one.path),
            model,
            mine,
            format=one.format,
            overwrite=one.overwrite,
            key=own if resume else None,
            tokenizer=tokenizer,
        )


def key_beside(key: checkpoint.Key | None, output: Output) -> checkpoint.Key | None:
    """Return the key of an output that goes with the one that has ``key``, which decides all but the format."""
    return None if key is None else {**key, "format": output.format, "settings": f"beside {key['settings']}"}


def with_others(done: QuantizeResult, output: Output, key: checkpoint.Key | None, *, resume: bool) -> QuantizeResult:
    """Write what goes with a first output that is whole, as far as it is not there yet, and return the result of all.

    Raises:
        FormatError: a checkpoint read back differs.
    """
    if not output.also or done.path is None or key is None:
        return done
    model: Any = done.model
    reference: SanityCheck | None = None
    written: list[dict[str, Any]] = []
    for one in output.also:
        target, own = Path(str(one.path)), key_beside(key, one)
        assert own is not None
        there = resume and is_done(target, own, overwrite=one.overwrite)
        found: Mapping[str, Any] = {}
        if not there:
            reference = reference or SanityCheck.start(model, done.tokenizer)
            found = _write(done.path, one, own, reference, model)
        written.append({"path": str(target), "format": one.format, "already_done": there, **found})
        log.info("%s: %s", target, "already done" if there else f"format {one.format}, the same numbers")
    return replace(done, outputs=written, already_done=done.already_done and all(one["already_done"] for one in written))


def _write(source: Path, output: Output, key: checkpoint.Key, reference: SanityCheck, model: Any) -> Mapping[str, Any]:
    """Write one of the further outputs; return how far the predictions of what was read back are from the model's."""

    def check(stage: Path) -> Mapping[str, Any]:
        return {"reload_kl": reference.check_reloaded(model, checkpoint.load(stage, compute="exact", cache=False))}

    with open_source(source, output.format) as opened:
        return convert(opened, Path(str(output.path)), output.format, key=key, overwrite=output.overwrite, check=check)
