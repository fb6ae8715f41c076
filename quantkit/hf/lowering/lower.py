"""Lower a transformers model to a decoder program without a table of architectures, and verify the result.

:func:`lower` records one forward pass (``quantkit/hf/lowering/trace.py``), finds out how its values are computed from one
another, writes that down as a :class:`~quantkit.kernels.program.definition.Program`, and then compares the program with the
recorded pass: each layer on the input that the model's own layer had, and the logits. If any of this fails, the model is
refused with the reason and runs through its modules instead. A model family is thus supported if it passes the verification,
including families that were unknown when this code was written.

Some properties do not show at the first few tokens. The verification is therefore repeated at the last positions that the model
supports, window sizes are read from the mask function, and rotary tables come from the model's own rotary module. Operations
that change large values only, such as clipping a projection, cannot be found by examples at all; configs that request them are
refused by name. Weights are shared with the model; norms are copied in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import QuantkitError, SpecError
from quantkit.hf.lowering import facts
from quantkit.hf.lowering.read_layer import LayerReader, Rotaries, clear_rows, linear_of
from quantkit.hf.lowering.trace import FAR, TOKENS, CannotWatch, Trace, flat, watch
from quantkit.hf.structure import find_stack
from quantkit.kernels.program import reference
from quantkit.kernels.program.definition import Experts, Layer, Linear, Norm, Program
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.install import float_activations
from quantkit.system.memory import return_freed_memory

_CLIPPING = ("clip_qkv",)
"""Config options that affect large values only."""

_LAYER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted norm of a layer's error relative to the norm of its output: room for the model's own rounding only.

Norms are compared, because in 16 bits a single channel can be wrong by a tenth of the largest value (measured: 0.08 in a layer
with a massive activation) while the whole output is right to a hundredth. A wrong computation changes the norm by tenths.
"""


class CannotLower(QuantkitError):
    """The model cannot be described as a program; the message is the reason."""


def lower(model: PreTrainedModel) -> Program:
    """Return a program that computes the same as ``model``.

    The model is run once or twice on :data:`~quantkit.hf.lowering.trace.TOKENS` tokens, in its own dtype. Its weights are
    shared: the program sees values that are changed in place (except norms), but weights that are *replaced* later need a new
    program.

    Args:
        model: a causal language model in eval mode.

    Raises:
        CannotLower: the model has an operation that programs cannot describe, or the verification failed.
    """
    try:
        with float_activations(model):
            return _lower(model)
    except (CannotWatch, SpecError) as error:
        raise CannotLower(str(error)) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, StopIteration) as error:
        raise CannotLower(f"recording its forward pass failed: {type(error).__name__}: {error}") from error


def _lower(model: PreTrainedModel) -> Program:
    if getattr(model.config, "is_encoder_decoder", False):
        raise CannotWatch("it is an encoder-decoder model")
    stack = model.get_submodule(find_stack(model))
    trace = watch(model, stack)
    program = _write(model, trace)
    _verify(program, trace)
    return_freed_memory()
    limit = min(length for length in (program.max_tokens, program.rope_switch, FAR // 4) if length)
    if limit > 2 * TOKENS:
        _verify(program, watch(model, stack, limit - TOKENS))
    return program


def _write(model: PreTrainedModel, trace: Trace) -> Program:
    config: Any = model.config.get_text_config(decoder=True)
    for option in _CLIPPING:
        if getattr(config, option, None) is not None:
            raise CannotWatch(f"the config has {option}")
    embedding, scale = _embedding(trace, config)
    rotaries = Rotaries([*trace.before, *(call for layer in trace.layers for call in layer.calls)])
    layers: list[Layer] = []
    for index, layer in enumerate(trace.layers):
        try:
            layers.append(LayerReader(layer, config, rotaries).read())
        except CannotWatch as error:
            raise CannotWatch(f"layer {index}: {error}") from error
        if index and not facts.same(layer.x, _out(trace.layers[index - 1].y)):
            raise CannotWatch(f"layer {index} does not read what layer {index - 1} returned")
    head, final_norm, logit_scale, softcap = _head(trace, config)
    return Program(
        name=type(model).__name__,
        embedding=embedding,
        layers=tuple(layers),
        head=head,
        final_norm=final_norm,
        rotaries=tuple(rotaries.used),
        embedding_scale=scale,
        logit_scale=logit_scale,
        logit_softcap=softcap,
        rope_switch=_rope_limit(config, "longrope"),
        max_tokens=_rope_limit(config, "dynamic") or getattr(config, "max_position_embeddings", None),
    )


def _embedding(trace: Trace, config: Any) -> tuple[Tensor | QuantEmbedding, float]:
    """Return the embedding table, and the factor from its rows to the first layer's input."""
    for call in trace.before:
        if isinstance(call.module, nn.Embedding | QuantEmbedding) and facts.same(call.x, trace.ids[None]):
            table = call.module if isinstance(call.module, QuantEmbedding) else call.module.weight.detach()
            rows, first = table(trace.ids) if isinstance(table, QuantEmbedding) else table[trace.ids], trace.layers[0].x
            scale = facts.factor(first, rows, config)
            if scale is None:
                break
            return table, scale
    raise CannotWatch(
        "the first layer's input is not an embedding times a number (are there learned positions, a norm or a projection?)"
    )


def _head(trace: Trace, config: Any) -> tuple[Linear, Norm | None, float, float | None]:
    """Return the output head, the norm before it, and the scale and the soft cap of the logits."""
    last = _out(trace.layers[-1].y)
    norms = [(call, norm) for call in facts.find(trace.after, x=last) if (norm := facts.as_norm(call)) is not None]
    inner, final_norm = (flat(norms[0][0].y), norms[0][1]) if norms else (last, None)
    call = next((c for c in facts.find(trace.after, x=inner) if facts.matrix(c) is not None), None)
    if call is None or trace.logits is None:
        raise CannotWatch("the output head does not read the final norm")
    y, logits = flat(call.y), trace.logits
    scale = facts.factor(logits, y, config)
    if scale is not None:
        return linear_of(call), final_norm, scale, None
    cap = facts.soft_cap(logits, y, config)
    if cap is None:
        raise CannotWatch("the logits are neither the head's output times a number nor soft-capped")
    return linear_of(call), final_norm, 1.0, cap


def _out(y: Tensor | None) -> Tensor:
    if y is None:
        raise CannotWatch("a layer returned nothing")
    return y


def _rope_limit(config: Any, kind: str) -> int | None:
    """Return the length beyond which rotary embeddings of ``kind`` ("longrope", "dynamic") change; None if there are none."""
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one set, or one per layer type
        if parameters.get("rope_type") == kind:
            return int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None


def _verify(program: Program, trace: Trace) -> None:
    """Compare the program with the recorded pass, each part on the model's own input.

    Raises:
        CannotWatch: naming the part whose output differs.
    """
    dtype = trace.layers[0].x.dtype
    limit = _LAYER_TOLERANCE.get(dtype, 1e-4)
    with torch.inference_mode():
        end = trace.start + len(trace.ids)
        tables = [(cos[trace.start :], sin[trace.start :]) for cos, sin in reference.tables_of(program, end, trace.ids.device)]
        _compare("the first layer's input", reference.embed(program, trace.ids), trace.layers[0].x, limit)
        for index, (layer, seen) in enumerate(zip(program.layers, trace.layers, strict=True)):
            got = reference.run_layer(program, layer, seen.x.float(), tables)
            want = _out(seen.y)
            if isinstance(layer.mlp, Experts):
                clear = clear_rows(seen, layer.mlp.router)
                got, want = got[clear], want[clear]
            _compare(f"layer {index}", got, want, limit)
        assert trace.logits is not None
        _compare("the logits", reference.read_out(program, _out(trace.layers[-1].y).float()), trace.logits, limit)


def _compare(what: str, got: Tensor, want: Tensor, limit: float) -> None:
    error = facts.distance(got, want)
    if not error < limit:
        raise CannotWatch(f"{what}: the program's output differs from the model's by {error:.2g} of its norm")
