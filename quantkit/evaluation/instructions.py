"""Does a model still do what it is told: twenty prompts whose answers a program can check.

Averages over text show little of how well a model follows instructions. Each prompt asks for a form (a number of items, JSON,
one word, capital letters), never for knowledge, and a function says whether the answer has it, as in IFEval (Zhou et al. 2023,
arXiv 2311.07911). Twenty answers are few: one more or less is nothing, five are something. Compare with the base: small models
fail many, too.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from quantkit.errors import QuantkitError
from quantkit.nn.embedding import max_positions

NEW_TOKENS: Final = 96
"""Longest answer."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What came of one prompt.

    Attributes:
        prompt, answer, base_answer: the prompt and the answers; None for the base if there is none.
        followed, base_followed: whether the answers have the form that was asked for.
    """

    prompt: str
    answer: str
    followed: bool
    base_answer: str | None = None
    base_followed: bool | None = None


def _lines(pattern: str, count: int) -> Callable[[str], bool]:
    """Return a check for exactly so many lines of a form; other lines do not count."""
    return lambda answer: len(re.findall(rf"(?m)^\s*{pattern}", answer)) == count


def _words(least: int, most: int) -> Callable[[str], bool]:
    return lambda answer: least <= len(re.findall(r"[\w'-]+", answer)) <= most


def _is(pattern: str) -> Callable[[str], bool]:
    return lambda answer: re.fullmatch(pattern, answer.strip(), re.IGNORECASE | re.DOTALL) is not None


def _json(check: Callable[[Any], bool]) -> Callable[[str], bool]:
    """Return a check of the JSON that an answer is, also between the fences of Markdown."""

    def checked(answer: str) -> bool:
        inner = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer.strip(), re.DOTALL)
        try:
            return check(json.loads(inner[1] if inner else answer))
        except ValueError:
            return False

    return checked


def _sentences(count: int) -> Callable[[str], bool]:
    return lambda answer: len(re.findall(r"[^.!?]+[.!?]+", answer.strip())) == count and answer.strip()[-1:] in ".!?"


PROMPTS: Final[tuple[tuple[str, Callable[[str], bool]], ...]] = (
    ("Is the sky blue on a clear day? Answer with yes or no only.", _is(r"(yes|no)[.!]?")),
    ("Name a colour. Answer with one word only.", _words(1, 1)),
    ("Write the word cat three times, separated by commas, and nothing else.", _is(r"cat,\s*cat,\s*cat\.?")),
    ("List three fruits as a numbered list, one on each line, as in: 1. ...", _lines(r"\d+[.)]\s+\S", 3)),
    ("List four animals as bullet points that begin with a hyphen.", _lines(r"[-*]\s+\S", 4)),
    ("Answer with a JSON object that has the key name and any name as its value, and nothing else.",
     _json(lambda found: isinstance(found, dict) and isinstance(found.get("name"), str))),
    ("Answer with a JSON list of the numbers one, two and three, and nothing else.", _json(lambda found: found == [1, 2, 3])),
    ("Write one sentence about rain.", _sentences(1)),
    ("Write exactly two sentences about dogs.", _sentences(2)),
    ("Say hello in capital letters only.", lambda answer: answer.isupper()),
    ("Describe the sea in lower case letters only.", lambda answer: answer.islower()),
    ("Write a sentence about winter that begins with the word Snow.", lambda answer: answer.strip().startswith("Snow")),
    ("Write a short answer that ends with the word END.", lambda answer: answer.strip().rstrip(".!\"'*").endswith("END")),
    ("Describe a house without using any comma.", lambda answer: bool(answer.strip()) and "," not in answer),
    ("Write a question about music.", lambda answer: answer.strip().rstrip("\"'*").endswith("?")),
    ("Put your whole answer in double quotation marks: what is your favourite season?", _is(r"[\"“].+[\"”]")),
    ("Count from 1 to 5, with spaces between the numbers and nothing else.", _is(r"1\s+2\s+3\s+4\s+5\.?")),
    ("What is a tree? Answer in at most ten words.", _words(1, 10)),
    ("Write a title for a story in square brackets, such as [A title], and nothing else.", _is(r"\[[^\]]+\]\.?")),
    ("Use the words moon and river in one short sentence.",
     lambda answer: {"moon", "river"} <= set(re.findall(r"[a-z]+", answer.lower()))),
)  # fmt: skip
"""What is asked, and whether an answer does it."""


def follows(model: nn.Module, base: nn.Module | None, tokenizer: Any, *, new_tokens: int = NEW_TOKENS) -> tuple[Followed, ...]:
    """Let a model, and its base, answer all prompts greedily through the chat template.

    Args:
        model, base: causal language models of transformers with one tokenizer; None for no base.
        tokenizer: their tokenizer.
        new_tokens: longest answer.

    Returns:
        What came of each prompt; nothing for a model without a chat template, which is told nothing.

    Raises:
        QuantkitError: there is no tokenizer.
    """
    if tokenizer is None:
        raise QuantkitError("instructions are text: give a tokenizer, or instructions=False")
    if not getattr(tokenizer, "chat_template", None):
        return ()
    mine = _answers(model, tokenizer, new_tokens)
    its = _answers(base, tokenizer, new_tokens) if base is not None else [None] * len(PROMPTS)
    return tuple(
        Followed(prompt, answer, check(answer), other, None if other is None else check(other))
        for (prompt, check), answer, other in zip(PROMPTS, mine, its, strict=True)
    )


def _answers(model: nn.Module, tokenizer: Any, new_tokens: int) -> list[str]:
    from quantkit.generation.generate import generate  # with transformers, which who only reads reports does without
    from quantkit.generation.text import encode_prompt

    asked = [encode_prompt([{"role": "user", "content": prompt}], tokenizer).tolist() for prompt, _ in PROMPTS]
    positions = max_positions(model)
    room = new_tokens if positions is None else min(new_tokens, positions - max(map(len, asked)))
    if room < 1:
        raise QuantkitError(f"the model's {positions} positions leave no room for an answer; leave the instructions out")
    return [one.text or "" for one in generate(model, asked, tokenizer, max_new_tokens=room)]


def summary(found: Sequence[Followed]) -> str:
    """Return the counts as a text: ``17 of 20, base 18 of 20``."""
    base = [one.base_followed for one in found if one.base_followed is not None]
    beside = f", base {sum(base)} of {len(base)}" if base else ""
    return f"{sum(one.followed for one in found)} of {len(found)}{beside}"
