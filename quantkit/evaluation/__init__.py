"""Measure a model: how well it predicts text, how far it is from another model, how fast it is, what it weighs.

:func:`evaluate` does all of it and returns an :class:`~quantkit.evaluation.record.EvalReport`. The modules do one thing each:
windows (what is scored), quality (perplexity and divergence), base (a base model's logits, reused), latency, footprint,
coverage (what was quantized), record (the result). Nothing here is random: the same model, text and machine score the same.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibrate.data import Batch, encoder, load_texts, text_default
from quantkit.errors import CalibrationError
from quantkit.evaluation.coverage import CoverageRow, summarise
from quantkit.evaluation.footprint import Footprint, footprint
from quantkit.evaluation.latency import Latency, compare_latency, max_positions, measure_latency
from quantkit.evaluation.quality import Divergence, Quality, score
from quantkit.evaluation.record import Environment, EvalReport, Protocol, describe_environment
from quantkit.evaluation.reference import BaseLogits
from quantkit.evaluation.through_cache import ThroughCache
from quantkit.evaluation.windows import Windows, cut_windows, from_batches
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.spec import KVScheme
from quantkit.system.progress import ProgressCallback, ignore

__all__ = [
    "BaseLogits", "CoverageRow", "Divergence", "Environment", "EvalReport", "Footprint", "Latency", "Protocol", "Quality",
    "Windows", "compare_latency", "cut_windows", "evaluate", "footprint", "from_batches", "measure_latency", "score",
    "summarise",
]  # fmt: skip

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module | str | Path,
    base: nn.Module | BaseLogits | str | Path | None = None,
    *,
    data: Any = None,
    tokenizer: Any = None,
    windows: int | None = 20,
    length: int = 1024,
    stride: int | None = None,
    bos: bool = False,
    kl_windows: int | None = None,
    batch_size: int = 1,
    latency: bool | Latency = True,
    kv: str | KVScheme | None = None,
    label: str | None = None,
    base_label: str | None = None,
    path: str | Path | None = None,
    progress: ProgressCallback = ignore,
) -> EvalReport:
    """Measure a model, and its distance from ``base`` if one is given.

    Args:
        model: a transformers model, or the path of a quantized checkpoint, or a float model's directory, hub id or GGUF file.
        base: the model it should agree with; a :class:`BaseLogits` when several models share one.
        data: text to score: a file, folder, dataset name or list of texts (:func:`quantkit.calibrate.data.load_texts`); token
            ids (n,) or (windows, length); batches; :class:`Windows`; None for the held-out half of the default text.
        tokenizer: for text; a path brings its own.
        windows: windows to score, spread evenly over the text; None for all.
        length: tokens of a window; less if the model has fewer positions (the report says what was used).
        stride: tokens between windows; None for windows that touch without overlapping.
        bos: start every window with the tokenizer's BOS token.
        kl_windows: compare with the base on the first so many windows only; None for all.
        batch_size: windows per forward.
        latency: measure speed too; or timings already taken, e.g. by :func:`compare_latency`, to put into the report.
        kv: score the model reading its keys and values from a memory stored this way (``"int8"``, ``"int4"``, a
            :class:`~quantkit.spec.KVScheme`, ``"float"``); None scores plain forward passes. The base is never changed.
        label: name in tables; by default the path's name, or what the weights are.
        base_label: likewise for the base.
        path: where a model given as an object has its checkpoint, to report the size on the disk.
        progress: receives stages ``"evaluate"`` and ``"latency"``.

    Raises:
        CalibrationError: no or too little text, no tokenizer for it, or logits that are not finite.
    """
    path, named = (path, False) if isinstance(model, nn.Module) else (model, True)
    model, own_tokenizer = _load(model)
    base_name = base_label or (None if base is None else _label(base))
    base = _load(base)[0] if isinstance(base, str | Path) else base
    cut, source = _windows(data, tokenizer or own_tokenizer, min(length, max_positions(model) or length), windows, stride, bos)
    scored = model if kv is None else ThroughCache(model, kv)
    quality = score(scored, cut, base, kl_windows=kl_windows, batch_size=batch_size, progress=progress)
    if latency is True:
        context = min(256, (max_positions(model) or 288) - 32)
        latency = measure_latency(model, prompt=cut.ids[0], context=max(context, 1), progress=progress)
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
    )


def _kv_name(kv: str | KVScheme) -> str:
    return kv if isinstance(kv, str) else kv.describe()


def _load(model: nn.Module | str | Path) -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer (None for a model object)."""
    if isinstance(model, nn.Module):
        return model, None
    from quantkit.checkpoint.open import open_model  # transformers is slow to import; a model object does not need it

    return open_model(model)


def _label(model: Any) -> str:
    if isinstance(model, str | Path):
        return Path(model).name
    if not isinstance(model, nn.Module):
        return "base"
    specs = {module.spec.describe() for module in model.modules() if isinstance(module, QuantLinear | QuantWeight)}
    return " + ".join(sorted(specs)) or str(next(model.parameters()).dtype).removeprefix("torch.")


def _windows(data: Any, tokenizer: Any, length: int, count: int | None, stride: int | None, bos: bool) -> tuple[Windows, str]:
    """Turn whatever the user gave into windows, and say in words what it was."""
    if isinstance(data, Windows):
        return data, "ready-made windows"
    if isinstance(data, Sequence) and data and all(isinstance(item, Batch) for item in data):
        return from_batches(data), "ready-made batches"
    if isinstance(data, Tensor) and data.ndim == 2:
        return from_batches([Batch(data.to(torch.int64))]), "ready-made token ids"
    bos_id = getattr(tokenizer, "bos_token_id", None) if bos else None
    if bos and bos_id is None:
        raise CalibrationError("bos=True, but there is no tokenizer or it has no BOS token; use bos=False")
    if isinstance(data, Tensor):
        tokens, source = data, "token ids"
    else:
        tokens, source = _tokens(data, tokenizer)
    cut = cut_windows(tokens, length=length, count=count, stride=stride, bos_id=bos_id)
    if count is not None and len(cut) < count:
        logger.warning("%d windows were asked for, %s has %d of length %d; all are used", count, source, len(cut), length)
    return cut, source


def _tokens(data: Any, tokenizer: Any) -> tuple[Tensor, str]:
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer to be scored: pass tokenizer=, or token ids as data")
    texts = text_default()[1] if data is None else load_texts(data)
    if data is None:
        source = f"language reference of Python {sys.version_info.major}.{sys.version_info.minor}, held-out topics"
    elif isinstance(data, str | Path):
        source = Path(data).name if Path(data).exists() else str(data)
    else:
        source = f"{len(texts)} texts"
    encode = encoder(tokenizer)
    return torch.cat([torch.as_tensor(encode(text), dtype=torch.int64) for text in texts]), source
