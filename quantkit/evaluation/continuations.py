"""What a model writes, beside what its base writes: greedy continuations of the same prompts.

Averages hide what people notice first: a model that repeats itself, or goes another way after three words. Two exact models
give the same text, and one changed token changes all that follow, so the number of equal tokens is a strict measure and a noisy
one: read the texts.

Repetition is the share of runs of four tokens that the continuation has had before (1 - distinct-4; Welleck et al. 2019, arXiv
1908.04319, section 6 with n = 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

RUN = 4
"""Tokens of the runs whose repetition is counted."""
PROMPT_TOKENS, NEW_TOKENS = 32, 48


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a model continues a prompt.

    Attributes:
        prompt, text, base_text: the prompt, and what follows; None for the base if there is none.
        equal_tokens: tokens before the first that differs from the base's; the length if none does; None without a base.
        tokens: tokens that the model wrote.
        repetition, base_repetition: share of runs of four tokens that were there before; None for a text without any.
    """

    prompt: str
    text: str
    base_text: str | None
    equal_tokens: int | None
    tokens: int
    repetition: float | None
    base_repetition: float | None


def repetition(tokens: Sequence[int]) -> float | None:
    """Return the share of runs of :data:`RUN` tokens that occurred before in ``tokens``; None for fewer tokens than one run."""
    runs = [tuple(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else None


def continuations(
    model: nn.Module, base: nn.Module | None, tokenizer: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int = NEW_TOKENS
) -> tuple[Continuation, ...]:
    """Let a model and its base continue prompts greedily.

    Args:
        model, base: causal language models of transformers with one tokenizer; None for no base.
        tokenizer: their tokenizer.
        prompts: token ids.
        new_tokens: longest continuation.
    """
    given = [list(prompt) for prompt in prompts]
    from quantkit.generation.generate import generate  # with transformers, which who only reads reports does without

    written = generate(model, given, tokenizer, max_new_tokens=new_tokens)
    others = generate(base, given, tokenizer, max_new_tokens=new_tokens) if base is not None else [None] * len(given)
    found = []
    for prompt, mine, its in zip(given, written, others, strict=True):
        same = None
        if its is not None:
            pairs = enumerate(zip(mine.ids, its.ids, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(mine.ids), len(its.ids)))
        found.append(
            Continuation(
                prompt=tokenizer.decode(prompt, skip_special_tokens=True),
                text=mine.text or "",
                base_text=None if its is None else its.text or "",
                equal_tokens=same,
                tokens=len(mine.ids),
                repetition=repetition(mine.ids),
                base_repetition=None if its is None else repetition(its.ids),
            )
        )
    return tuple(found)
