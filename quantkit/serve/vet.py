"""Compile grammars in a process of its own, which can be ended when one takes too long or too much memory.

As a program, it reads lines of JSON: the tokenizer first, then one grammar after the other; it answers each with a line that
says what is wrong with it, or null. It imports nothing but llguidance, so it starts in a fraction of a second.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

LIMITS: dict[str, Any] = {"max_grammar_size": 100_000, "max_lexer_states": 20_000, "verbose_errors": False}
"""Limits of a grammar (``llguidance.LLParserLimits``) below its defaults, which are for grammars of one's own."""
MEMORY_BYTES = 4 << 30
"""Most address space of the process."""


class Vetting:
    """Asks another process whether a grammar compiles in time. The process starts with the first question.

    Args:
        tokenizer: JSON of the tokenizer.
        end_tokens: token ids that end an answer.
        seconds: time for one grammar.
    """

    def __init__(self, tokenizer: str, end_tokens: Sequence[int], seconds: float) -> None:
        self._first = json.dumps([tokenizer, list(end_tokens)])
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._asking = threading.Lock()

    def check(self, grammar: str) -> str | None:
        """Return what is wrong with a grammar; None for nothing."""
        with self._asking:
            process = self._process or self._start()
            late = threading.Timer(self._seconds, process.kill)
            late.start()
            try:
                answer = self._ask(process, grammar)
            finally:
                late.cancel()
            if answer:
                return json.loads(answer)  # type: ignore[no-any-return]
            self._end()
            return f"compiling it takes more than {self._seconds:g} s or too much memory; make it simpler"

    def close(self) -> None:
        """End the process."""
        with self._asking:
            self._end()

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-I", __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        self._ask(self._process, json.loads(self._first))  # reading the tokenizer is not in the grammar's time
        return self._process

    @staticmethod
    def _ask(process: "subprocess.Popen[str]", question: object) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        except OSError:  # it has been ended
            return ""
        return process.stdout.readline()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    """Answer questions until the input ends."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    try:
        import resource
    except ImportError:  # Windows: the time is still bounded
        resource = None  # type: ignore[assignment]
    tokenizer, end_tokens = json.loads(sys.stdin.readline())
    known = LLTokenizer(tokenizer, eos_token=end_tokens)
    if resource is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _answer(None)
    for line in sys.stdin:
        matcher = LLMatcher(known, json.loads(line), log_level=0, limits=LLParserLimits(**LIMITS))
        _answer(matcher.get_error() if matcher.is_error() else None)


def _answer(reason: str | None) -> None:
    sys.stdout.write(json.dumps(reason) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
