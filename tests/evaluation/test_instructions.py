"""Prompts whose answers a program checks, and one long window in parts."""

import math

import pytest
import torch

from quantkit.errors import CalibrationError, QuantkitError
from quantkit.evaluation import EvalReport, evaluate
from quantkit.evaluation.instructions import PROMPTS, Followed, follows, summary
from quantkit.evaluation.long_context import by_distance
from quantkit.report import distance_rows, instruction_rows, render_html
from quantkit.report.cells import DASH
from tests.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<bos>{{ m.role }} {{ m.content }} . {% endfor %}"
GOOD = (
    "Yes.",
    "Blue.",
    "cat, cat, cat",
    "1. apple\n2. pear\n3. plum",
    "- dog\n- cat\n- cow\n- hen",
    '{"name": "Ann"}',
    "[1, 2, 3]",
    "Rain falls from clouds.",
    "Dogs bark. They also run!",
    "HELLO, YOU!",
    "it is blue and wide.",
    "Snow covers the fields.",
    "That is all. END",
    "It has a red roof and two doors.",
    "Do you like jazz?",
    '"Spring is."',
    "1 2 3 4 5",
    "A tall plant with a trunk.",
    "[The Last Train]",
    "The moon lights the river.",
)
BAD = (
    "Yes, it is.",
    "Blue and red",
    "cat cat cat",
    "1. apple\n2. pear",
    "- dog\n- cat\n- cow",
    "name: Ann",
    "1, 2, 3",
    "Rain falls. It is wet.",
    "Dogs bark.",
    "Hello",
    "The sea is blue.",
    "In winter, Snow falls.",
    "END of it",
    "Red, with doors",
    "I like jazz.",
    "Spring is.",
    "1, 2, 3, 4, 5",
    "A tree is a tall plant that has a trunk and many leaves on it.",
    "The Last Train",
    "The moon is bright.",
)


def test_every_prompt_takes_a_good_answer_and_refuses_a_bad_one():
    assert len(PROMPTS) == len(GOOD) == len(BAD) == 20
    for (prompt, check), good, bad in zip(PROMPTS, GOOD, BAD, strict=True):
        assert check(good), prompt
        assert not check(bad), prompt
        assert not check(""), prompt
    assert PROMPTS[5][1]('```json\n{"name": "Ann"}\n```')


def test_both_models_are_asked_and_the_report_keeps_it(tmp_path):
    tokenizer, base, model = tiny_tokenizer(), tiny_llama(), tiny_llama(seed=3)
    tokenizer.chat_template = TEMPLATE
    text = torch.arange(3, 60).repeat(8)
    options = {"data": text, "tokenizer": tokenizer, "windows": 2, "length": 32, "latency": False}
    report = evaluate(model, base, instructions=True, long_context=64, **options)
    assert len(report.instructions) == 20
    assert all(one.base_answer is not None and one.base_followed is not None for one in report.instructions)
    assert report.summary()["instructions followed"] == summary(report.instructions)
    report.save(tmp_path / "report.json")
    assert EvalReport.load(tmp_path / "report.json") == report
    page = render_html([report])
    assert "Do they do what they are told" in page
    assert "Far from the beginning" in page
    plain = evaluate(model, base, **options)
    assert plain.instructions == plain.long_context == ()
    assert "Far from" not in render_html([plain])
    assert follows(model, None, tiny_tokenizer()) == ()
    with pytest.raises(QuantkitError, match="give a tokenizer"):
        follows(model, None, None)


def test_a_summary_counts_the_base_only_where_there_is_one():
    alone = (Followed("p", "a", True), Followed("p", "a", False))
    assert summary(alone) == "1 of 2"
    assert summary((Followed("p", "a", True, "b", False),)) == "1 of 1, base 0 of 1"
    assert instruction_rows(alone)[1][0][3:] == (DASH, "yes")


def test_parts_of_a_long_window_make_up_the_whole():
    model, base, tokens = tiny_llama(seed=3).double(), tiny_llama().double(), torch.arange(3, 60).repeat(2)[:101]
    parts = by_distance(model, base, tokens)
    assert [(one.first, one.last) for one in parts] == [(0, 25), (25, 50), (50, 76), (76, 101)]
    with torch.no_grad():
        found, wanted = (one(tokens[None]).logits[0].log_softmax(-1) for one in (model, base))
    nll = -found[:-1].gather(1, tokens[1:, None])[:, 0]
    kl = (wanted.exp() * (wanted - found)).sum(-1)[:-1]
    for one in parts:
        rows = slice(max(one.first, 1) - 1, one.last - 1)
        assert one.perplexity == pytest.approx(math.exp(nll[rows].mean()), rel=1e-6)
        assert one.kl == pytest.approx(float(kl[rows].mean()), rel=1e-5)
    assert all(one.kl is None and one.base_perplexity is None for one in by_distance(model, None, tokens))
    assert distance_rows(parts)[1][0][0] == "0 to 24"
    with pytest.raises(CalibrationError, match="at least 8"):
        by_distance(model, None, tokens[:7])
