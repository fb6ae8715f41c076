"""The engine for a transformers model: many requests at the same time, from token ids to token ids."""

from typing import Any

from torch import nn

from quantkit.engine.drafters import DRAFTERS, Drafter, DrafterContext, DraftModel
from quantkit.engine.drafters.base import MODEL_DRAFTER
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.options import DrafterChoice
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.spec import KVScheme


class Engine(TokenEngine):
    """Serve many requests with one model: continuous batching, paged keys and values, drafting.

    >>> engine = quantkit.Engine(model)  # doctest: +SKIP
    >>> requests = [engine.submit(ids, max_new_tokens=64) for ids in prompts]  # doctest: +SKIP
    >>> for event in engine.run():  # doctest: +SKIP
    ...     print(event.request.number, event.token, event.finish)

    Args:
        model: a causal language model of transformers, quantized or not; it is put in eval mode.
        kv: how keys and values are stored: ``"float"``, ``"int8"``, ``"int4"`` or a :class:`~quantkit.spec.KVScheme`.
        limits: how much work to accept; None for the defaults.
        drafter: proposes tokens that the model verifies several at a time; answers do not change. ``"ngram"`` looks them up in
            the text so far; ``"self"`` computes them with the upper four bits of the model's own int8 weights (native CPU
            engine only); a smaller model with the same vocabulary generates them. Also a pair of a registered name and a model,
            or any :class:`~quantkit.engine.drafters.Drafter`.
        engine: ``"native"`` (one native call per step), ``"modules"`` (the model's own forward), or ``"auto"``: native if
            possible, else modules.
        compute: ``"auto"``, what the model was loaded with (:func:`quantkit.load`); ``"exact"``; ``"int8"``, which is faster
            and less exact; or ``"float32"``, which keeps a bfloat16 model from rounding activations to bfloat16 where that is
            faster. What differs from how the model was loaded needs the native CPU engine.
        batch_invariant: answers are bitwise independent of the other requests and of drafts. The native CPU engine guarantees
            this always; on CUDA, prompts are read several times slower.

    Raises:
        QuantkitError: an option that is unknown or that the model's engine lacks; see
            :func:`~quantkit.hf.backend.make_backend` and :func:`make_drafter`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kv: str | KVScheme = "float",
        limits: Limits | None = None,
        drafter: DrafterChoice = None,
        engine: str = "auto",
        compute: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        options: dict[str, Any] = {"engine": engine, "compute": compute, "batch_invariant": batch_invariant}
        backend = make_backend(model.eval(), kv, **options)  # type: ignore[arg-type]
        super().__init__(backend, input_table(model)[0], limits=limits)
        self.use_drafter(make_drafter(drafter, self))


def make_drafter(choice: DrafterChoice, engine: TokenEngine) -> Drafter | None:
    """Return the drafter that a user chose, made for ``engine``.

    Args:
        choice: a registered name; a smaller model; a registered name and a model; a drafter, returned as it is; or None.
        engine: the engine that will verify the drafts.

    Raises:
        QuantkitError: an unknown name, a missing or superfluous model, or a drafter that cannot work with this engine.
    """
    match choice:
        case str():
            name, model = choice, None
        case nn.Module():
            name, model = MODEL_DRAFTER, choice
        case (name, model):
            pass
        case _:
            return choice
    factory = DRAFTERS.get(name)
    if factory.needs_model and model is None:
        raise QuantkitError(f"drafter={name!r} drafts with a smaller model, and none was given; give drafter=({name!r}, model)")
    if model is not None and not factory.needs_model:
        raise QuantkitError(f"drafter={name!r} does not use a second model; give the name alone")
    second = None if model is None else DraftModel(make_backend(model.eval()), input_table(model)[0])  # type: ignore[arg-type]
    return factory.make(DrafterContext(engine.backend, engine.limits, engine.vocabulary, second))
