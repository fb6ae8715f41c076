"""Measure a model: its perplexity, its divergence from another model, its speed and its size.

:func:`evaluate` measures all of them and returns an :class:`~quantkit.evaluation.record.EvalReport`. The modules: windows
(which tokens are scored), quality (perplexity and divergence), reference (logits of a base model, reused), latency, footprint,
coverage (which weights were quantized), record (the result), sanity (the short check of a quantized model), trace (serving
simulated requests). Nothing here is random: the same model, text and machine give the same scores.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from quantkit.calibrate.chat import Passage
from quantkit.calibrate.data import Batch, refuse_ids
from quantkit.calibrate.texts import chosen_opening, encode_passages, read_texts, text_default
from quantkit.errors import CalibrationError
from quantkit.evaluation.continuations import PROMPT_TOKENS, Continuation, continuations
from quantkit.evaluation.coverage import CoverageRow, summarise
from quantkit.evaluation.footprint import Footprint, footprint
from quantkit.evaluation.instructions import Followed, follows
from quantkit.evaluation.latency import Latency, compare_latency, measure_latency
from quantkit.evaluation.long_context import Stretch, by_distance
from quantkit.evaluation.protocols import protocol_windows
from quantkit.evaluation.quality import Divergence, Quality, score
from quantkit.evaluation.record import Environment, EvalReport, Protocol, describe_environment
from quantkit.evaluation.reference import BaseLogits
from quantkit.evaluation.through_cache import ThroughCache
from quantkit.evaluation.windows import Windows, cut_windows, from_batches
from quantkit.nn.embedding import input_table, max_positions
from quantkit.nn.install import describe_compute
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.spec import KVScheme
from quantkit.system.keywords import check_names, take
from quantkit.system.progress import ProgressChoice, callback

__all__ = [
    "BaseLogits", "CoverageRow", "Divergence", "Environment", "EvalReport", "Footprint", "Latency", "Protocol", "Quality",
    "Windows", "choose_windows", "compare_latency", "cut_windows", "evaluate", "footprint", "from_batches", "is_answer",
    "measure_latency", "score", "summarise",
]  # fmt: skip

logger = logging.getLogger(__name__)


class EvaluationOptions(TypedDict, total=False):
    """The less common keyword options of :func:`evaluate`, which documents them."""

    windows: int | None
    length: int
    stride: int | None
    bos: bool | None
    column: str | None
    template: str | None
    kl_windows: int | None
    batch_size: int
    base_label: str | None
    path: str | Path | None
    protocol: str | None
    samples: int
    instructions: bool
    long_context: int


_WINDOWS, _SCORING = (
    frozenset({"windows", "length", "stride", "bos", "column", "template", "protocol"}),
    frozenset({"kl_windows", "batch_size"}),
)
_COUNTS = frozenset({"windows", "length", "stride", "kl_windows", "batch_size", "samples", "long_context"})


def evaluate(
    model: nn.Module | str | Path,
    base: nn.Module | BaseLogits | str | Path | None = None,
    *,
    data: Any = None,
    tokenizer: Any = None,
    latency: bool | Latency = True,
    kv: str | KVScheme | None = None,
    label: str | None = None,
    progress: ProgressChoice = "auto",
    **options: Unpack[EvaluationOptions],
) -> EvalReport:
    """Measure a model, and its divergence from ``base`` if one is given.

    Args:
        model: a transformers model; or the path of a quantized checkpoint; or the directory, hub id or GGUF file of a float
            model.
        base: the reference model for the divergence; a :class:`BaseLogits` to share its logits between several evaluations.
        data: text to score: a file, folder, dataset name or list of texts or rows, as for calibration
            (:class:`quantkit.Calibration`); token ids (n,) or (windows, length); batches; :class:`Windows`; None for the
            held-out half of the default text.
        tokenizer: tokenizer for text; a model that is given as a path has its own.
        latency: whether to measure speed; or earlier timings, for instance of :func:`compare_latency`, for the report.
        kv: score the model while it reads its keys and values from a memory that stores them this way (``"int8"``, ``"int4"``,
            ``"float"``, or a :class:`~quantkit.spec.KVScheme`); None scores plain forward passes. The base is not affected.
        label: name of the model in tables; by default the name of its path, or the format of its weights.
        progress: ``"auto"`` for bars, None for silence, or a function that receives ``"evaluate"`` and ``"latency"``.
        **options: any of the following keyword arguments.
            ``windows`` (20): number of windows to score, spread evenly over the text; None for all.
            ``length`` (1024): tokens per window, at most the number of positions of the model; the report has the length used.
            ``stride`` (None): tokens between the starts of windows; None for adjacent windows.
            ``bos`` (None): start every window with the tokenizer's BOS token; None for what the tokenizer does with a text.
            ``column``, ``template`` (None): which column of rows is read, and the chat template of conversations, as for
            calibration.
            ``kl_windows`` (None): compare with the base on the first windows only, this many; None for all.
            ``batch_size`` (1): windows per forward pass.
            ``base_label``: name of the base, by default like ``label``.
            ``protocol`` (None): score as a paper or another program does, whose windows, lengths and BOS replace those above:
            ``"gptq-2048"``, ``"llama.cpp-512"``; see :mod:`quantkit.evaluation.protocols`.
            ``samples`` (0): let the model, and its base, continue so many prompts from the text, to be read in the report.
            ``instructions`` (False): let both answer twenty prompts whose form is checked; see
            :mod:`quantkit.evaluation.instructions`.
            ``long_context`` (0): score one window of so many tokens, in parts; see :mod:`quantkit.evaluation.long_context`.
            ``path``: directory of the checkpoint, to report its size on the disk, for a model that is given as an object.

    Returns:
        The report.

    Raises:
        CalibrationError: no text or too little, no tokenizer for it, or logits that are not finite.
        TypeError: an unknown option.
    """
    check_names("evaluate", options, EvaluationOptions.__optional_keys__)
    for name in _COUNTS & options.keys():
        value: Any = options.get(name)
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise CalibrationError(f"evaluate: {name}={value!r}: want a whole number")
    progress = callback(progress)
    path, named = (options.get("path"), False) if isinstance(model, nn.Module) else (model, True)
    model, own_tokenizer = _load(model)
    base_name = options.get("base_label") or (None if base is None else _label(base))
    base = _load(base)[0] if isinstance(base, str | Path) else base
    cut, source = _cut(data, tokenizer or own_tokenizer, model, take(options, _WINDOWS))
    _check_fit(cut, model)
    scored = model if kv is None else ThroughCache(model, kv)
    quality = score(scored, cut, base, progress=progress, **take(options, _SCORING))
    if latency is True:
        context = min(256, (max_positions(model) or 288) - 32)
        latency = measure_latency(model, prompt=cut.ids[0], context=max(context, 1), progress=progress)
    written, followed = _generated(model, base, tokenizer or own_tokenizer, cut, options)
    stretches: tuple[Stretch, ...] = ()
    if longest := options.get("long_context", 0):
        one, _ = choose_windows(data, tokenizer or own_tokenizer, max_positions(model), windows=1, length=longest)
        stretches = by_distance(scored, base, one.ids[0])
    divergence = quality.divergence
    parameter = next(model.parameters())
    return EvalReport(
        label=(label or _label(path if named else model)) + ("" if kv is None else f", kv {_kv_name(kv)}"),
        quality=quality,
        protocol=Protocol(
            source=source,
            fingerprint=cut.fingerprint(),
            length=cut.length,
            stride=cut.stride,
            bos=cut.bos,
            windows=len(cut),
            available_windows=cut.available,
            tokens=quality.tokens,
            kl_windows=0 if divergence is None else divergence.windows,
            kl_tokens=0 if divergence is None else divergence.tokens,
        ),
        footprint=footprint(model, path),
        environment=describe_environment(parameter.dtype, parameter.device),
        latency=latency or None,
        base=base_name,
        compute=describe_compute(model),
        continuations=written,
        instructions=followed,
        long_context=stretches,
    )


def _generated(
    model: nn.Module, base: Any, tokenizer: Any, cut: Windows, options: EvaluationOptions
) -> tuple[tuple[Continuation, ...], tuple[Followed, ...]]:
    """Return what the model and its base write, as far as that is asked for."""
    known = base.model if isinstance(base, BaseLogits) else base
    beside = known if isinstance(known, nn.Module) else None
    written: tuple[Continuation, ...] = ()
    if samples := options.get("samples", 0):
        prompts = cut.ids[:: max(len(cut) // samples, 1), :PROMPT_TOKENS][:samples].tolist()
        written = continuations(model, beside, _reader(tokenizer), prompts)
    return written, follows(model, beside, tokenizer) if options.get("instructions", False) else ()


def _reader(tokenizer: Any) -> Any:
    """Return the tokenizer that continuations are read with."""
    if tokenizer is None:
        raise CalibrationError("samples are read as text: give a tokenizer, or samples=0")
    return tokenizer


def is_answer(
    report: EvalReport,
    model: nn.Module,
    *,
    data: Any,
    tokenizer: Any,
    latency: bool,
    base: str | None,
    **options: Unpack[EvaluationOptions],
) -> bool:
    """Say whether a report is what :func:`evaluate` was asked for with these arguments: the same windows of the same text,
    compared with the same base, and timed if timing is wanted.
    """
    cut, _ = _cut(data, tokenizer, model, take(options, _WINDOWS))
    same = (report.protocol.fingerprint, report.base) == (cut.fingerprint(), base)
    return same and report.compute in ("", describe_compute(model)) and (not latency or bool(report.latency))


def _kv_name(kv: str | KVScheme) -> str:
    return kv if isinstance(kv, str) else kv.describe()


def _load(model: nn.Module | str | Path) -> tuple[nn.Module, Any]:
    """Return the model, and its tokenizer or None for a model object."""
    if isinstance(model, nn.Module):
        return model, None
    from quantkit.checkpoint.open import open_model  # imports transformers, which is slow and not needed for a model object

    return open_model(model)


def _label(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    if not isinstance(model, nn.Module):
        return "base"
    specs = {module.spec.describe() for module in model.modules() if isinstance(module, QuantLinear | QuantWeight)}
    return " + ".join(sorted(specs)) or str(next(model.parameters()).dtype).removeprefix("torch.")


def _cut(data: Any, tokenizer: Any, model: nn.Module, chosen: dict[str, Any]) -> tuple[Windows, str]:
    """Return the windows that options choose: those of a protocol, or one's own."""
    protocol = chosen.pop("protocol", None)
    if protocol is None:
        return choose_windows(data, tokenizer, max_positions(model), **chosen)
    own = sorted(name for name in ("length", "stride", "bos") if chosen.pop(name, None) is not None)
    if own:
        raise CalibrationError(f"protocol {protocol} says what windows are: leave {', '.join(own)} out")
    return protocol_windows(protocol, data, tokenizer, max_positions(model), chosen.pop("windows", None), **chosen)


def choose_windows(
    data: Any,
    tokenizer: Any,
    positions: int | None,
    *,
    windows: int | None = 20,
    length: int = 1024,
    stride: int | None = None,
    bos: bool | None = None,
    **columns: str | None,
) -> tuple[Windows, str]:
    """Return the windows for the given data, and a description of the data; arguments as for :func:`evaluate`.

    ``positions`` is the longest window that the model takes, None for any.
    """
    length = min(length, positions or length)
    if isinstance(data, Windows):
        return data, "given windows"
    if isinstance(data, Sequence) and data and all(isinstance(item, Batch) for item in data):
        return from_batches(data), "given batches"
    if isinstance(data, Tensor) and data.ndim == 2:
        return from_batches([Batch(data.to(torch.int64))]), "given token ids"
    if isinstance(data, Tensor):
        tokens, source, begin = data, "token ids", chosen_opening(tokenizer, bos) if bos else ()
    else:
        tokens, source, begin = _tokens(data, tokenizer, bos, columns)
    cut = cut_windows(tokens, length=length, count=windows, stride=stride, bos_id=begin or None)
    if windows is not None and len(cut) < windows:
        logger.warning("windows=%d: %s has only %d of length %d, all are used", windows, source, len(cut), length)
    return cut, source


def _check_fit(windows: Windows, model: Any) -> None:
    """Refuse ids that the model's embedding does not have, and windows longer than its positions."""
    if not hasattr(model, "get_input_embeddings"):
        return
    refuse_ids(windows.ids, input_table(model)[0])
    positions = max_positions(model)
    if positions is not None and windows.length > positions:
        raise CalibrationError(
            f"windows of {windows.length} tokens are longer than the {positions} positions of the model; give shorter ones"
        )


def _tokens(
    data: Any, tokenizer: Any, bos: bool | None, columns: Mapping[str, str | None]
) -> tuple[Tensor, str, tuple[int, ...]]:
    """Return the ids of a text, a description of it, and what windows begin with."""
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer: give tokenizer=, or token ids as data")
    if data is None:
        source = f"language reference of Python {sys.version_info.major}.{sys.version_info.minor}, held-out topics"
        passages = [Passage(text, source) for text in text_default()[1]]
    else:
        texts = read_texts(data, tokenizer=tokenizer, **columns)
        passages, source = texts.passages, ", ".join([texts.name, *(f"column {name}" for name in texts.columns)])
    begin = chosen_opening(tokenizer, bos)
    tokens = torch.cat(encode_passages(passages, tokenizer))
    if begin and tuple(tokens[: len(begin)].tolist()) == begin:  # a chat template has put it there
        tokens = tokens[len(begin) :]
    return tokens, source, begin
