"""Perplexity by protocols of others, against their own loops written out; intervals; continuations; tasks of the harness."""

import json
import math

import numpy as np
import pytest
import torch

from quantkit.errors import CalibrationError
from quantkit.evaluation import evaluate
from quantkit.evaluation.continuations import continuations, repetition
from quantkit.evaluation.protocols import protocol_windows
from quantkit.evaluation.quality import bootstrap
from quantkit.evaluation.record import EvalReport
from quantkit.report import comparison_table, continuation_rows, render_html
from tests.tiny import TEXT, tiny_llama, tiny_tokenizer


def with_bos():
    """Return a tokenizer that begins texts with BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def gptq_loop(model, ids, length):
    """The loop of gptq/opt.py: the mean loss of each window's shifted tokens, times its length."""
    nlls = []
    for i in range(ids.shape[1] // length):
        batch = ids[:, i * length : (i + 1) * length]
        loss = torch.nn.functional.cross_entropy(model(batch).logits[0, :-1].float(), batch[0, 1:])
        nlls.append(loss * length)
    return math.exp(torch.stack(nlls).sum() / (len(nlls) * length))


def llama_cpp_loop(model, ids, length, bos):
    """The loop of perplexity.cpp: first = n_ctx / 2; count += n_ctx - first - 1 for each chunk."""
    nll, count, first = 0.0, 0, length // 2
    for i in range(ids.shape[1] // length):
        batch = ids[:, i * length : (i + 1) * length].clone()
        if bos is not None:
            batch[0, 0] = bos
        logs = model(batch).logits[0].float().log_softmax(-1)
        for j in range(first, length - 1):
            nll -= float(logs[j, batch[0, j + 1]])
        count += length - first - 1
    return math.exp(nll / count)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("kind", ["gptq", "llama.cpp"])
@torch.no_grad()
def test_numbers_are_those_of_the_others(tmp_path, kind, opened):
    model, tokenizer = tiny_llama(), with_bos() if opened else tiny_tokenizer()
    text = f"{TEXT}\n\n {TEXT}\n"
    (tmp_path / "test.txt").write_text(text)
    report = evaluate(
        model, data=tmp_path / "test.txt", tokenizer=tokenizer, latency=False, protocol=f"{kind}-32", batch_size=3
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    want = gptq_loop(model, ids, 32) if kind == "gptq" else llama_cpp_loop(model, ids, 32, 1 if opened else None)
    assert report.quality.perplexity == pytest.approx(want, rel=1e-5)
    assert report.protocol.windows == report.protocol.available_windows == ids.shape[1] // 32
    assert report.protocol.source == f"test.txt, protocol {kind}-32"


def test_what_a_protocol_cannot_take_is_refused(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ask = lambda name, data=TEXT, **options: evaluate(  # noqa: E731
        model, data=[data] if isinstance(data, str) else data, tokenizer=tokenizer, latency=False, protocol=name, **options
    )
    for name, reason in (("gptq-2048", "the model takes 128"), ("gptq", "want one of"), ("awq-64", "want one of")):
        with pytest.raises(CalibrationError, match=reason):
            ask(name)
    with pytest.raises(CalibrationError, match="leave length out"):
        ask("gptq-64", length=64)
    with pytest.raises(CalibrationError, match="give more text"):
        ask("gptq-64", "the cat")
    with pytest.raises(CalibrationError, match="give the text"):
        ask("gptq-64", None)
    assert ask("gptq-64", windows=2).protocol.windows == 2
    cut, _ = protocol_windows("gptq-64", torch.arange(130), None, None)
    assert cut.ids.flatten().tolist() == list(range(128))


def test_intervals_draw_windows_not_tokens():
    rng = np.random.default_rng(1)
    cluster = np.repeat(np.arange(40), 50)
    values = np.repeat(rng.normal(3, 1, 40), 50) + rng.normal(0, 0.01, 2000)  # tokens of a window are nearly equal
    low, high = bootstrap(values, cluster)
    error = values.reshape(40, 50).mean(1).std(ddof=1) / math.sqrt(40)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert bootstrap(values, cluster) == (low, high)
    assert bootstrap(values, np.zeros(2000, int)) is None


def test_continuations_beside_the_base(tmp_path):
    model, base, tokenizer = tiny_llama(seed=1), tiny_llama(), tiny_tokenizer()
    report = evaluate(model, base, data=[TEXT], tokenizer=tokenizer, latency=False, windows=2, length=40, samples=2)
    assert len(report.continuations) == 2
    assert all(0 <= one.equal_tokens < one.tokens for one in report.continuations)
    same = continuations(base, base, tokenizer, [tokenizer("the cat sat")["input_ids"]], new_tokens=20)[0]
    assert (same.text, same.equal_tokens) == (same.base_text, same.tokens)
    alone = continuations(base, None, tokenizer, [[5, 6]])[0]
    assert (alone.base_text, alone.equal_tokens) == (None, None)
    report.save(tmp_path / "report.json")
    assert EvalReport.load(tmp_path / "report.json") == report
    page = render_html([report])
    assert "What they write" in page
    heads, rows = continuation_rows(report.continuations)
    assert len(rows) == 2
    assert {len(row) for row in rows} == {len(heads)}
    low, high = report.quality.divergence.interval
    assert low <= report.quality.divergence.mean <= high


def test_repetition_counts_runs():
    assert repetition([1, 2, 3]) is None
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1] * 13) == pytest.approx(0.9)


def test_rows_of_two_kinds_are_marked(capsys):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    one = evaluate(model, data=[TEXT], tokenizer=tokenizer, latency=False, windows=1, length=40)
    import dataclasses

    mixed = [dataclasses.replace(one, compute="exact"), dataclasses.replace(one, compute="int8 activations"), one]
    titles = [column.header for column in comparison_table(mixed).columns]
    assert "products" in titles
    assert "products" not in [column.header for column in comparison_table(mixed[::2]).columns]


TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@torch.no_grad()
def test_tasks_of_the_harness(tmp_path, monkeypatch):
    from quantkit.evaluation.harness import HarnessLM, run_tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    choices = ["a mat", "green hills", "bread"]

    def likelihood(question, choice):
        context, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        rows = range(len(context), len(whole))
        return sum(float(logs[i - 1, whole[i]]) for i in rows), all(int(logs[i - 1].argmax()) == whole[i] for i in rows)

    questions = ["the cat sat on", "one small dog", "sky and"]
    best = [max(range(3), key=lambda i, q=q: likelihood(q, choices[i])[0]) for q in questions]
    right = [best[0], best[1], (best[2] + 1) % 3]
    rows = [{"question": q, "choices": choices, "answer": a} for q, a in zip(questions, right, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK % (tmp_path / "rows.jsonl"))
    [score] = run_tasks(model, tokenizer, [tmp_path / "tiny.yaml"])
    assert (score.task, score.metric, score.examples) == ("tiny_choice", "acc", 3)
    assert score.value == pytest.approx(2 / 3)
    assert run_tasks(model, tokenizer, [tmp_path / "tiny.yaml"], limit=1)[0].examples == 1

    lm = HarnessLM(model, tokenizer)
    pair = [(None, *lm._encode_pair(questions[0], f" {choices[0]}"))]
    [(value, greedy)] = lm._loglikelihood_tokens(pair)
    assert (value, greedy) == (pytest.approx(likelihood(questions[0], choices[0])[0], abs=1e-4), False)
    with pytest.raises(CalibrationError, match="no such file"):
        run_tasks(model, tokenizer, [tmp_path / "none.yaml"])
    (tmp_path / "wrong.yaml").write_text("[1]")
    with pytest.raises(CalibrationError, match="a line 'task: NAME'"):
        run_tasks(model, tokenizer, [tmp_path / "wrong.yaml"])


@torch.no_grad()
def test_texts_and_answers_for_the_harness():
    from lm_eval.api.instance import Instance

    from quantkit.evaluation.harness import HarnessLM
    from quantkit.generation.generate import generate

    model, tokenizer = tiny_llama(), tiny_tokenizer()
    lm = HarnessLM(model, tokenizer)
    ask = lambda kind, *arguments: Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # noqa: E731
    text = "the cat sat on a mat " * 30  # longer than the context
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 128
    [rolled] = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    total, start = 0.0, 0
    while start < len(ids):  # windows of 126 tokens, each with the token before it, or BOS
        part = ids[start : start + 126]
        before = [1] if start == 0 else ids[max(0, start + len(part) - 127) : start]
        logs = model(torch.tensor([[*before, *part]])).logits[0].log_softmax(-1)
        total += sum(float(logs[len(before) + i - 1, token]) for i, token in enumerate(part))
        start += len(part)
    assert rolled == pytest.approx(total, rel=1e-4)
    free = generate(model, "a dog", tokenizer, max_new_tokens=12).text
    [cut, whole] = lm.generate_until(
        [
            ask("generate_until", "a dog", {"until": [free[4:7]], "max_gen_toks": 12, "do_sample": False}),
            ask("generate_until", "a dog", {"until": [], "max_gen_toks": 12, "temperature": 0.0}),
        ]
    )
    assert whole == free
    assert cut == free[: free.index(free[4:7])]
    with pytest.raises(CalibrationError, match="num_beams"):
        lm.generate_until([ask("generate_until", "a", {"num_beams": 4})])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert lm.apply_chat_template([{"role": "user", "content": "the cat"}]) == "the cat "
