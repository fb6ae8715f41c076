"""The engine for a model: many requests at once, token ids in, token ids out."""

from typing import Any

from torch import nn

from quantkit.engine.drafters import DRAFTERS, Drafter
from quantkit.engine.drafters.model import ModelDrafter
from quantkit.engine.drafters.self_draft import SelfDrafter
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.hf.backend import make_backend
from quantkit.nn.embedding import input_table
from quantkit.spec import KVScheme


class Engine(TokenEngine):
    """Serve many requests with one model: continuous batching, paged keys and values, drafts. Token ids in, token ids out.

    >>> engine = quantkit.Engine(model)  # doctest: +SKIP
    >>> requests = [engine.submit(ids, max_new_tokens=64) for ids in prompts]  # doctest: +SKIP
    >>> for event in engine.run():  # doctest: +SKIP
    ...     print(event.request.number, event.token, event.finish)

    Args:
        model: a causal language model of transformers, quantized or not; put in eval mode.
        kv: how keys and values are stored: ``"float"``, ``"int8"``, ``"int4"`` or a :class:`~quantkit.spec.KVScheme`.
        limits: how much to take on; None for the defaults.
        drafter: guesses ahead, to decode several tokens at once: ``"ngram"``; ``"twin"``, the upper four bits of the model's
            own int8 weights (native only); a smaller model with the same vocabulary; or any
            :class:`~quantkit.engine.drafters.Drafter`. Answers do not change.
        engine: ``"native"`` (one call per step), ``"modules"`` (the model's own forward), or ``"auto"``, the first that
            can run it.
        compute: ``"int8"`` rounds inputs, faster and less exact; ``"float32"`` keeps those of a bfloat16 model from being
            rounded to bfloat16 where that is faster; both native, on a CPU.
        batch_invariant: an answer is the same bits whatever runs beside it, with drafts and without. The CPU's native engine is
            always so; CUDA's reads prompts several times slower for it.

    Raises:
        QuantkitError: what :func:`~quantkit.hf.backend.make_backend` and :class:`~quantkit.engine.engine.TokenEngine` refuse.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kv: str | KVScheme = "float",
        limits: Limits | None = None,
        drafter: str | nn.Module | Drafter | None = None,
        engine: str = "auto",
        compute: str = "float",
        batch_invariant: bool = False,
    ) -> None:
        options: dict[str, Any] = {"engine": engine, "compute": compute, "batch_invariant": batch_invariant}
        backend = make_backend(model.eval(), kv, **options)  # type: ignore[arg-type]
        super().__init__(backend, input_table(model)[0], limits=limits)
        self.use_drafter(make_drafter(drafter, self))


def make_drafter(drafter: str | nn.Module | Drafter | None, engine: TokenEngine) -> Drafter | None:
    """Make a drafter of what a user may give."""
    if isinstance(drafter, nn.Module):
        context = engine.limits.context_tokens
        assert context is not None
        backend = make_backend(drafter.eval())  # type: ignore[arg-type]
        return ModelDrafter(backend, engine.limits.running, context, vocabulary=(input_table(drafter)[0], engine.vocabulary))
    if isinstance(drafter, str):
        if drafter == "model":
            raise QuantkitError("drafter='model' needs to know which: give the smaller model itself")
        if drafter == "twin":
            return SelfDrafter(engine.backend)
        return DRAFTERS.get(drafter)()
    return drafter
