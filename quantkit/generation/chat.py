"""A conversation with a model, turn by turn: the chat template around the engine.

The engine keeps the keys and values of what was said, so that a turn reads only what is new, as far as the template leaves what
came before as it was.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from quantkit.engine.request import FinishReason, Limits
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import end_tokens
from quantkit.generation.options import DrafterChoice
from quantkit.generation.text import Message, TextStream, encode_prompt


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        system: what the model is told before the first turn; None tells it nothing.
        drafter: see :class:`quantkit.Engine`.
        **options: ``kv``, ``engine``, ``compute`` of the engine.

    Attributes:
        messages: of all turns, in the form that templates read.

    Raises:
        QuantkitError: the tokenizer has no chat template, or an option that the engine lacks.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, system: str | None = None, *, drafter: DrafterChoice = None, **options: Any
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise QuantkitError(
                "this model has no chat template: it continues text and was not taught to answer; give it a text to continue "
                "(quantkit generate MODEL PROMPT), or take the instruction-tuned model of the same name"
            )
        self._tokenizer, self._end = tokenizer, set(end_tokens(model))
        self._engine = Engine(model, limits=Limits(running=1, waiting=1), drafter=drafter, **options)
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)

    @property
    def runs(self) -> str:
        """Name of the engine that runs the model."""
        return self._engine.backend.engine

    @property
    def context_tokens(self) -> int:
        """Longest conversation in tokens."""
        return self._engine.limits.context_tokens or 0

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._first)

    def say(
        self,
        text: str,
        show: Callable[[str], None] | None = None,
        *,
        max_new_tokens: int = 1024,
        sampling: Sampling | None = None,
    ) -> tuple[str, FinishReason | None]:
        """Add a turn, and the model's answer to it.

        Args:
            text: what the user says.
            show: called with each piece of the answer.
            max_new_tokens: longest answer; less where the model's context ends.
            sampling: how tokens are chosen; None is greedy.

        Returns:
            The answer, and why it ended: None where it was interrupted (:class:`KeyboardInterrupt`), which ends the answer and
            keeps what there is of it.

        Raises:
            QuantkitError: the conversation is longer than the model's context, or the template refuses it; the turn is taken
                back.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = encode_prompt(turns, self._tokenizer).tolist()
        room = self.context_tokens - len(ids)
        if room < 1:
            raise QuantkitError(
                f"the conversation has {len(ids)} tokens, the model's context {self.context_tokens}; start a new one (/reset)"
            )
        stream = TextStream(self._tokenizer, (), show)
        request = self._engine.submit(
            ids, max_new_tokens=min(max_new_tokens, room), sampling=sampling, stop_tokens=self._end, watch=stream.add
        )
        reason: FinishReason | None = None
        try:
            for _ in self._engine.run():  # also what is left to say of an earlier, interrupted answer
                if request.error is not None:
                    raise request.error
            reason = request.finish_reason
        except KeyboardInterrupt:
            self._engine.cancel(request)
        answer = stream.finish()
        self.messages = [*turns, {"role": "assistant", "content": answer}]
        return answer, reason
