"""Answers of a given form: JSON, JSON of a schema, tool calls. llguidance (extra ``serve``) does the work.

A grammar comes from a client, so it may be made to take for ever. llguidance bounds the work of each token (fuel), but not
all of the work of compiling: a hundred regular expressions that must hold at once, or a large ``multipleOf``, keep it busy for
minutes. So each grammar is first compiled in a process of its own (:mod:`quantkit.serve.vet`), which is ended after
:data:`COMPILE_S` seconds.

llguidance: Moskal et al., github.com/guidance-ai/llguidance; it follows a regular-expression lexer by derivatives and an Earley
parser, and walks through the vocabulary's trie for each mask.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from quantkit.errors import QuantkitError
from quantkit.serve.vet import LIMITS, Vetting

COMPILE_S = 5.0
"""Longest time that compiling a grammar may take."""
GRAMMAR_BYTES = 64 << 10
"""Longest grammar. Compiling takes time that grows with the square of the number of properties: 0.1 s for these bytes."""
WHITE_SPACE = r" ?|\n {0,24}"
"""Between the parts of JSON: nothing, a space, or a new line with its indentation. Small models else go on with it for ever."""
KEPT = 64
"""Number of compiled grammars that are kept."""


class Grammars:
    """Compiles grammars for one tokenizer. Any thread may use it, one at a time.

    Args:
        tokenizer: a tokenizer of transformers; a fast one, since llguidance reads its JSON.
        end_tokens: token ids that end an answer.

    Raises:
        QuantkitError: the tokenizer is not a fast one, or llguidance does not know its kind.
    """

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int]) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not end_tokens:
            what = "it is not a fast tokenizer" if backend is None else "the model has no end-of-sequence token"
            raise QuantkitError(what)
        text = json.loads(backend.to_str())
        text.update(padding=None, truncation=None)
        self._known = len(tokenizer)
        self._vet = Vetting(json.dumps(text), list(end_tokens), COMPILE_S)
        self._tokenizer = LLTokenizer(json.dumps(text), eos_token=list(end_tokens))
        self._compiled = functools.lru_cache(KEPT)(self._compile)

    def close(self) -> None:
        """End the process that compiles."""
        self._vet.close()

    def constraint(self, grammar: str) -> "Grammar":
        """Return a new constraint for one answer.

        Args:
            grammar: llguidance's JSON or Lark form.

        Raises:
            QuantkitError: the grammar is too large, takes too long, or is not one.
        """
        if len(grammar.encode()) > GRAMMAR_BYTES:
            raise QuantkitError(f"the schema has more than {GRAMMAR_BYTES} bytes as a grammar; make it smaller")
        compiled = self._compiled(grammar)
        if isinstance(compiled, str):
            raise QuantkitError(f"the schema cannot be used: {shorten(compiled)}")
        return Grammar(compiled.deep_copy(), self._tokenizer.vocab_size)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; none for a special one, and for one that the tokenizer does not know."""
        known = token < self._known and not self._tokenizer.is_special_token(token)
        return bytes(self._tokenizer.decode_bytes([token])) if known else b""

    def _compile(self, grammar: str) -> LLMatcher | str:
        """Return the grammar in its first state, or what is wrong with it."""
        reason = self._vet.check(grammar)
        if reason is not None:
            return reason
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        return str(matcher.get_error()) if matcher.is_error() else matcher


class Grammar:
    """A grammar that one answer follows; see :class:`~quantkit.engine.constraint.Constraint`.

    Args:
        matcher: the grammar's state, which this object changes.
        vocabulary: number of token ids that it knows.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._words = matcher, -(-vocabulary // 32)

    @property
    def error(self) -> QuantkitError | None:
        """See :class:`~quantkit.engine.constraint.Constraint`."""
        if not self._matcher.is_error():
            return None
        return QuantkitError(f"the form of the answer became too complicated: {shorten(self._matcher.get_error())}")

    def fitting(self, drafts: Sequence[int]) -> int:
        """See :class:`~quantkit.engine.constraint.Constraint`."""
        return int(self._matcher.validate_tokens(list(drafts)))

    def allowed(self, drafts: Sequence[int]) -> NDArray[np.uint8]:
        """See :class:`~quantkit.engine.constraint.Constraint`."""
        bits = np.zeros((1 + len(drafts), self._words), np.int32)
        consumed = 0
        for row in range(len(bits)):
            if not self._matcher.is_error():
                self._matcher.unsafe_compute_mask_ptr(bits[row].ctypes.data, bits[row].nbytes)
            if row == len(drafts) or self._matcher.is_stopped() or not self._matcher.consume_token(drafts[row]):
                break
            consumed += 1
        if consumed:
            self._matcher.rollback(consumed)
        return bits.view(np.uint8)

    def accept(self, token: int) -> bool:
        """See :class:`~quantkit.engine.constraint.Constraint`."""
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()


def shorten(reason: str) -> str:
    """Return a reason on one line, cut to what a person reads."""
    line = " ".join(reason.removesuffix("<non-verbose/>").split())
    return line if len(line) <= 200 else f"{line[:197]}..."


def written(schema: dict[str, Any] | bool) -> str:
    """Return a schema as grammars hold it: JSON is written in one line or with indentation, not with endless white space."""
    if schema is False:
        raise QuantkitError("the schema false allows nothing; give one that allows something")
    return json.dumps({**(schema if isinstance(schema, dict) else {}), "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def json_grammar(schema: dict[str, Any] | bool) -> str:
    """Return the grammar of JSON that a schema allows; ``{"type": "object"}`` allows every object."""
    return str(LLMatcher.grammar_from_json_schema(written(schema)))


def lark_grammar(rules: str) -> str:
    """Return the grammar that rules in llguidance's variant of Lark describe."""
    return str(LLMatcher.grammar_from_lark(rules))
