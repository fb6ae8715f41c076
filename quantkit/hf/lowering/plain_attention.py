"""Find attention that a model computes itself, between the keys that its cache returns and the values.

Some models multiply queries by keys, scale, add a bias and take the softmax in their own forward. While such a step is
recorded, the cache returns a few tokens' keys and values, whose elements are those of a value that stands for the past. What is
computed between the two products that read them is run on random scores: if every probability is the softmax of
``a * score + b``, with one a and a b that grows evenly from token to token (ALiBi) or not at all, it is attention and is
written down as such.

A mask that the model makes itself, instead of asking transformers' mask functions, is refused: a few tokens do not show what it
hides from many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.hf.lowering.record import Ids, Recorder
from quantkit.hf.lowering.trace import CannotWatch, MaskReader
from quantkit.kernels.program import run_tape
from quantkit.kernels.program.tape import Attend, Compute, Join, Read, Step


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """The keys and values that a cache returned.

    Attributes:
        k, v: elements of the token's own, (heads, dim).
        keys, values: numbers of the values that stand for all tokens', (heads, tokens, dim).
        tokens: how many they are.
    """

    k: Ids
    v: Ids
    keys: int
    values: int
    tokens: int


def find(recorder: Recorder, past: Past, mask: int | None, masks: MaskReader, cache: int, far: bool) -> None:
    """Replace the steps between two products by an :class:`Attend`.

    Args:
        recorder: holds the steps; changed.
        past: the keys and values.
        mask: value that stands for the mask, whose elements are all zero; None if there is none.
        masks: says which window and chunk the mask stands for.
        cache: number of the keys and values.
        far: whether the past is longer than any window, so that a mask of the model's own is seen as a whole.

    Raises:
        CannotWatch: it is no attention.
    """
    steps = recorder.steps
    scores, before = _product(steps, past.keys, "keys")
    out, _ = _product(steps, past.values, "values")
    q, probabilities = scores.reads[0], out.reads[0]
    heads, rows, dim = q.shape
    key_dim, value_dim = past.k.shape[1], past.v.shape[1]
    group, rest = divmod(heads, past.k.shape[0])
    if rows != 1 or rest or dim != key_dim or out.reads[0].shape != (heads, 1, past.tokens):
        raise CannotWatch("its own attention has an unusual shape")
    for read, size, within in ((scores.reads[1], key_dim, (key_dim, 1)), (out.reads[1], value_dim, (1, value_dim))):
        first = [read.offset + head * read.strides[0] for head in range(heads)]
        if first != [head // group * past.tokens * size for head in range(heads)] or read.strides[1:] != within:
            raise CannotWatch("its own attention reads keys or values in an unusual order")
    factor, slopes, window = _fit(steps[before + 1 :], scores.out, probabilities, mask, (heads, past.tokens), far)
    span = masks.only() if mask is not None or window is None else (None, None)
    if window is not None:
        span = (window if span[0] is None else min(window, span[0]), span[1])
    ids = (np.arange(heads)[:, None] * q.strides[0] + np.arange(dim) * q.strides[2]) + q.offset
    if not isinstance(q.source, int):
        raise CannotWatch("its own attention reads constants")
    place = steps.index(out)
    recorder.steps = steps[:place]
    reads = [recorder.run(part) for part in (recorder.elements(q.source)[ids], past.k, past.v)]
    recorder.steps.append(
        Attend(
            (reads[0], reads[1], reads[2]),
            out.out,
            heads,
            past.k.shape[0],
            key_dim,
            value_dim,
            cache,
            True,
            factor,
            *span,
            slopes=slopes,
        )
    )
    recorder.steps += steps[place + 1 :]


def _product(steps: Sequence[Step], source: int, what: str) -> tuple[Compute, int]:
    """Return the one product that reads a value, and its place."""
    found = [(step, place) for place, step in enumerate(steps) if source in _sources(step)]
    if len(found) != 1:
        raise CannotWatch(f"its own attention reads the {what} of its cache {len(found)} times, want once")
    step, place = found[0]
    if not isinstance(step, Compute) or step.op != "contract" or source in _sources(step)[:1]:
        raise CannotWatch(f"what it does with the {what} of its cache is no product")
    return step, place


def _sources(step: Step) -> list[int]:
    """Return the values that a step reads; -1 for constants."""
    return [read.source if isinstance(read.source, int) else -1 for read in step.reads]


def _fit(
    steps: Sequence[Step], scores: int, probabilities: Read, mask: int | None, shape: tuple[int, int], far: bool
) -> tuple[float, Tensor | None, int | None]:
    """Return a and the slopes of the module's docstring, and the window of a mask of the model's own.

    Args:
        steps: those after the product with the keys.
        scores: its result, (heads, tokens).
        probabilities: what is multiplied by the values.
        mask, far: see :func:`find`.
        shape: numbers of heads and tokens.
    """
    heads, tokens = shape
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(8, heads * tokens, generator=generator, dtype=torch.float64) * 4 - 2
    known: dict[int, Tensor] = {scores: r}
    if mask is not None:
        known[mask] = torch.zeros(8, tokens, dtype=torch.float64)
    for step in steps:
        sources = [read.source for read in step.reads]
        if not any(isinstance(one, int) and one in known for one in sources):
            continue
        if not all(isinstance(one, Tensor) or one in known for one in sources) or not isinstance(step, Compute | Join):
            continue  # the one that reads values, or another token's number
        if isinstance(step, Compute):
            if step.op == "where" and isinstance(step.reads[0].source, Tensor) and not far:
                raise CannotWatch("its own attention has a mask of its own")
            known[step.out] = run_tape.compute(step, [run_tape.read(read, known).double() for read in step.reads])
        else:
            known[step.out] = run_tape.join(step, [run_tape.read(read, known).double() for read in step.reads])
        if isinstance(probabilities.source, int) and step.out == probabilities.source:
            break
    if not isinstance(probabilities.source, int) or probabilities.source not in known:
        raise CannotWatch("its own attention depends on more than scores")
    p = run_tape.read(probabilities, known).view(8, heads, tokens)
    seen = int((p[0, 0] > 0).sum())
    if not bool((p[..., tokens - seen :] > 0).all()) or bool((p[..., : tokens - seen] > 0).any()):
        raise CannotWatch("its own attention has a mask that is no window")
    window, tokens = None if seen == tokens else seen, seen
    p, r = p[..., -seen:].log(), r.view(8, heads, -1)[..., -seen:]
    p, r = p - p[..., :1], r - r[..., :1]
    a = float(((p[0] - p[1]) * (r[0] - r[1])).sum() / (r[0] - r[1]).square().sum())
    b = (p - a * r).mean(0)  # (heads, tokens)
    places = torch.arange(tokens, dtype=torch.float64)
    slopes = b[:, -1] / (tokens - 1)
    if not (p - a * r - slopes[:, None] * places).abs().max() < 1e-3 * max(1.0, float(p.abs().max())):
        raise CannotWatch("its own attention is not the softmax of scaled scores")
    return a, slopes.float() if slopes.abs().max() > 1e-5 else None, window
