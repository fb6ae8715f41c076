"""Texts from files of any kind, columns and chat templates, and what a text begins with in use."""

import bz2
import csv
import gzip
import io
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from quantkit.calibrate.data import Calibration, fingerprint
from quantkit.calibrate.texts import load_texts, opening, read_texts
from quantkit.errors import CalibrationError
from quantkit.evaluation import evaluate
from quantkit.evaluation.sanity import SanityCheck
from quantkit.pipeline.quantize import collect, quantize
from tests.tiny import FAMILIES, TEXT, tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools. {% endif %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }}{% if m.tool_calls %} calls {{ m.tool_calls | length }}{% endif %} . "
    "{% endfor %}"
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
SAID = "user : the cat . assistant : sat on a mat . "


def chatty(template: object = TEMPLATE, bos: bool = False):
    """Return a tokenizer with a chat template that, if asked to, puts BOS before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def as_csv(rows: list[dict[str, object]], delimiter: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


ROWS = [{"id": 1, "text": "the cat, sat"}, {"id": 2, "text": 'on "a" mat\nwhile'}]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    lines = "\n".join(json.dumps(row) for row in rows)
    kind = path.name.partition(".")[2]
    content = {
        "jsonl": lines,
        "ndjson": lines + "\n\n",
        "json": json.dumps(rows, indent=1),
        "csv": as_csv(rows),
        "tsv": as_csv(rows, "\t"),
        "jsonl.gz": lines,
        "csv.bz2": as_csv(rows),
    }
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    packed = {"gz": gzip.compress, "bz2": bz2.compress}.get(kind.rpartition(".")[2], bytes)(content[kind].encode())
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.bz2"])
def test_the_text_of_a_table_is_read_and_not_the_file(tmp_path, kind):
    found = read_texts(str(write(tmp_path / f"rows.{kind}", ROWS)))
    assert [passage.text for passage in found.passages] == [row["text"] for row in ROWS]
    assert found.facts() == {"data": f"rows.{kind}", "texts": 2, "columns": ["text"]}


def test_json_comes_in_many_shapes(tmp_path):
    path = tmp_path / "rows.json"
    shapes = {
        json.dumps({"version": 1, "data": ROWS}): 2,
        json.dumps({"text": "alone"}): 1,
        json.dumps(["a b", "c d", "e"]): 3,
        "\n".join(json.dumps(row) for row in ROWS): 2,
        '"a b"\n"c d"\n': 2,
    }
    for text, count in shapes.items():
        path.write_text(text)
        assert len(load_texts(path)) == count, text
    path.write_text(json.dumps({"messages": CHAT}))
    assert load_texts(path, tokenizer=chatty()) == [SAID]
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "the cat"}]}))
    assert load_texts(path, tokenizer=chatty()) == ["user : the cat . "]


def test_a_folder_mixes_kinds_and_each_file_has_its_own_columns(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.parquet", [{"messages": CHAT}])
    (tmp_path / "c.txt").write_text("plain")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = read_texts(tmp_path, tokenizer=chatty())
    assert [passage.text for passage in found.passages] == [*(row["text"] for row in ROWS), SAID, "plain"]
    assert (found.columns, found.template) == (("text", "messages"), "tokenizer")


def test_lists_of_rows_datasets_and_saved_datasets(tmp_path):
    assert load_texts(ROWS) == [row["text"] for row in ROWS]
    made = datasets.Dataset.from_list([{"n": 1, "messages": CHAT}, {"n": 2, "messages": CHAT}])
    assert load_texts(made, tokenizer=chatty()) == [SAID, SAID]
    made.save_to_disk(str(tmp_path / "saved"))
    assert load_texts(tmp_path / "saved", tokenizer=chatty()) == [SAID, SAID]
    (tmp_path / "batches.json").write_text(json.dumps([{"text": "a"}]))
    assert Calibration([{"text": TEXT}], samples=2, length=8).batches(tiny_tokenizer())[0].ids.shape == (2, 8)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": CHAT}, SAID),
        ({"messages": json.dumps(CHAT)}, SAID),
        ({"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on a mat"}]}, SAID),
        ({"prompt": "the cat", "response": "sat on a mat"}, SAID),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, SAID),
        ({"question": "the cat", "answer": "sat on a mat", "id": 3}, SAID),
        ({"instruction": "the cat", "input": "", "output": "sat on a mat"}, SAID),
        (
            {"instruction": "the", "input": "cat", "output": "sat", "system": "be kind"},
            "system : be kind . user : the\n\ncat . assistant : sat . ",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, *CHAT, {"role": "tool", "content": "7", "name": None}]},
            f"system : x . {SAID}tool : 7 . ",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}], "tools": '[{"name": "t"}]'},
            "1 tools. assistant :  calls 1 . ",
        ),
    ],
)
def test_conversations_go_through_the_template(row, wanted):
    assert load_texts([row], tokenizer=chatty()) == [wanted]


def test_a_template_is_named_or_given(tmp_path):
    shout = "{% for m in messages %}{{ m.content | upper }}!{% endfor %}"
    (tmp_path / "shout.jinja").write_text(shout)
    several = chatty({"default": TEMPLATE, "shout": shout})
    for template, tokenizer in (("shout", several), (shout, tiny_tokenizer()), (str(tmp_path / "shout.jinja"), chatty())):
        found = read_texts([{"messages": CHAT}], template=template, tokenizer=tokenizer)
        assert found.passages[0].text == "THE CAT!SAT ON A MAT!"
        assert found.template == "shout" if template == "shout" else str(found.template).startswith("sha256:")
    with pytest.raises(CalibrationError, match=r"template='shuot' is no file.*did you mean 'shout'"):
        read_texts([{"messages": CHAT}], template="shuot", tokenizer=several)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "messages": CHAT}], {}, "could be messages, text; columns: text, messages; name one with column="),
        ([{"text": "a", "prompt": "p", "response": "r"}], {}, "could be prompt.response, text"),
        ([{"title": "a", "body": "b"}], {}, "could be title, body"),
        ([{"n": 1, "m": [2]}], {}, "none holds text or a conversation; columns: n, m"),
        ([{"title": "a"}], {"column": "titles"}, "no column of text 'titles'; did you mean 'title'"),
        ([{"n": 1}], {"column": "n"}, "column 'n' holds int"),
        ([{"text": "a"}, {"txt": "b"}], {"column": "text"}, "row 2: no column 'text', which other rows have; it has txt"),
        ([{"text": "a"}, {"text": 3}], {}, "row 2: column 'text' is a int, want text"),
        ([{"text": "a"}, "b"], {}, "1 of 2 rows have columns"),
        ([{"text": ""}, {"text": None}], {}, "there is no text in it"),
        ([{"messages": CHAT}, {"messages": []}], {}, "row 2: column 'messages' has no message; remove the row"),
        ([{"messages": [{"role": "wizard", "content": "a"}]}], {}, "message 1: role 'wizard'; want role and content"),
        ([{"messages": [{"role": "user"}]}], {}, "a message of user without content"),
        ([{"messages": ["hello"]}], {}, "want a list of messages"),
        ([{"prompt": "a", "response": " "}], {}, "column 'response' is empty; remove the row"),
        ([{"messages": CHAT, "tools": "{"}], {}, "column 'tools' is text that is no valid JSON"),
        ([{"text": "a"}], {"template": "{{ messages }}"}, "template= is for conversations, and column text is text"),
        (["a"], {"column": "text"}, "column='text': the data is plain text"),
        ([3], {}, "row 1 is a int"),
        ([[1, 2]], {}, "use from_ids"),
        (iter(["a"]), {}, "data is a list_iterator; want a path"),
    ],
)
def test_what_is_not_clear_is_said_with_the_columns(rows, options, message):
    with pytest.raises(CalibrationError, match=message):
        load_texts(rows, tokenizer=chatty(), **options)


def test_templates_that_are_missing_or_refuse_are_named():
    with pytest.raises(CalibrationError, match="need a chat template, and the tokenizer has none; give a tokenizer with one"):
        load_texts([{"messages": CHAT}], tokenizer=tiny_tokenizer())
    with pytest.raises(CalibrationError, match="there is no tokenizer"):
        load_texts([{"messages": CHAT}])
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"data: the chat template refuses .* \(user, assistant\).*alternate"):
        load_texts([{"messages": CHAT}], tokenizer=chatty(strict))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', "row 2 is a int"),
        ("a.json", b"3", "it holds a int"),
        ("a.json", b"[" * 20000, "not valid JSON"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ("a.csv", b"text,label\na,1\nb\n", "line 3: 1 values, the first line names 2 columns"),
        ("a.csv", b'text\n"a\n', "quote texts"),
        ("a.csv", b"a,a\n1,2\n", "names a column twice"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        ("a.txt", b'{"text": "a"}\n{"text": "b"}\n', "named as text and holds JSON; name it .jsonl"),
        ("a.log", b'[{"role": "user"}]', "named as text and holds JSON"),
        ("a.txt", "wide".encode("utf-16-le"), "is NUL"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_texts(tmp_path / name)


def test_a_table_may_hold_long_texts_and_unusual_lines(tmp_path):
    long = "word " * 50_000
    assert load_texts(write(tmp_path / "long.csv", [{"text": long}])) == [long]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False), encoding="utf-8-sig")
    assert load_texts(tmp_path / "a.jsonl") == ["one\u2028two"]


def test_half_a_surrogate_pair_is_named_by_row():
    with pytest.raises(CalibrationError, match=r"data, row 2: character 1 is .*half a surrogate pair"):
        Calibration([{"text": TEXT}, {"text": "a\ud83d"}], samples=1, length=8).batches(tiny_tokenizer())


# what a text begins with


def test_windows_begin_as_the_tokenizer_begins_a_text():
    assert (opening(tiny_tokenizer()), opening(chatty(bos=True))) == ((), (1,))
    bare = Calibration([TEXT], samples=4, length=16).batches(tiny_tokenizer())
    opened, facts = Calibration([TEXT], samples=4, length=16).read(chatty(bos=True))
    assert {row[0].item() for batch in opened for row in batch.rows()} == {1}
    assert all(batch.ids.shape[1] == 16 for batch in opened)
    assert facts["begins_with"] == [1]
    assert torch.equal(opened[0].ids[0, 1:], bare[0].ids[0, :15])
    assert fingerprint(Calibration([TEXT], samples=4, length=16, bos=False).batches(chatty(bos=True))) == fingerprint(bare)
    forced = Calibration([TEXT], samples=4, length=16, bos=True).batches(tiny_tokenizer())
    assert fingerprint(forced) == fingerprint(opened)
    ragged = Calibration([TEXT, "the cat"], samples=2, length=16, mode="ragged").batches(chatty(bos=True))
    assert [row[0].item() for batch in ragged for row in batch.rows()] == [1, 1]


def test_a_template_that_writes_bos_is_not_given_another():
    tokenizer = chatty("{{ bos_token }}" + TEMPLATE, bos=True)
    rows = [{"messages": CHAT}] * 30
    ragged = Calibration(rows, samples=30, length=64, mode="ragged").batches(tokenizer)
    assert all(row[:2].tolist().count(1) == 1 for batch in ragged for row in batch.rows())
    packed = Calibration(rows, samples=8, length=24).batches(tokenizer)
    assert all(row[0] == 1 and row[1] != 1 for batch in packed for row in batch.rows())


def test_quality_is_recorded_as_the_model_is_used():
    check = SanityCheck.start(tiny_llama(), chatty(bos=True))
    assert check.windows.ids[:, 0].tolist() == [1, 1]
    assert SanityCheck.start(tiny_llama(), tiny_tokenizer()).windows.ids[0, 0] != 1
    found = evaluate(tiny_llama(), data=[TEXT], tokenizer=chatty(bos=True), windows=2, length=16, latency=False)
    assert (found.protocol.bos, found.protocol.tokens) == (True, 30)
    chats = evaluate(tiny_llama(), data=[{"messages": CHAT}] * 9, tokenizer=chatty(), windows=2, length=16, latency=False)
    assert chats.protocol.source == "9 texts, column messages"


def test_a_checkpoint_says_what_it_was_calibrated_with(tmp_path):
    path = write(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 20)
    result = quantize(
        tiny_llama(), "w4a16", calibration=Calibration(str(path), samples=4, length=16), tokenizer=chatty(bos=True)
    )
    found = result.metadata["calibration"]
    assert {key: found[key] for key in ("data", "columns", "template", "begins_with", "rows", "tokens")} == {
        "data": "chats.jsonl",
        "columns": ["messages"],
        "template": "tokenizer",
        "begins_with": [1],
        "rows": 4,
        "tokens": 64,
    }
    assert len(found["fingerprint"]) == 64


# what does not fit the model


@pytest.mark.parametrize("call", [quantize, collect, evaluate])
def test_ids_and_lengths_that_the_model_does_not_have(call):
    def run(ids: torch.Tensor) -> None:
        data = {"data": ids, "latency": False} if call is evaluate else {"calibration": Calibration([ids])}
        call(FAMILIES["gpt2"](), **data)

    for ids, message in (
        (torch.full((1, 8), 192), "token id 192: the model's embedding knows ids 0 to 191"),
        (torch.full((1, 8), -1), "token id -1"),
        (torch.ones(1, 200, dtype=torch.int64), "longer than the 128 positions of the model"),
    ):
        with pytest.raises(CalibrationError, match=message):
            run(ids)


@pytest.mark.parametrize("call", [quantize, collect, evaluate])
def test_a_tokenizer_of_another_model_or_of_none_is_refused(call):
    def run(model: object, tokenizer: object) -> None:
        options = {"data": [TEXT], "latency": False, "length": 16, "windows": 1}
        options = options if call is evaluate else {"calibration": Calibration([TEXT], samples=2, length=16)}
        call(model, tokenizer=tokenizer, **options)

    with pytest.raises(CalibrationError, match="the model's embedding knows ids 0 to 9; is the tokenizer another model's"):
        run(tiny_llama(vocab_size=10), tiny_tokenizer())
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(CalibrationError, match=r"knows nothing of the text \(its vocabulary has 0 tokens\).*pass tokenizer="):
        run(tiny_llama(), empty)


def test_token_ids_are_given_alone_or_in_lists():
    ids = torch.randint(3, 190, (2, 16))
    assert fingerprint(Calibration(ids).batches(None)) == fingerprint(Calibration([ids]).batches(None))
    with pytest.raises(CalibrationError, match="token ids with a str in it"):
        Calibration([ids, "text"]).batches(tiny_tokenizer())


# answers only


def test_only_answers_count_and_each_token_of_them():
    rows = [{"messages": CHAT * 2}] * 8
    (batch,) = Calibration(rows, samples=2, length=24, answers_only=True).batches(chatty(bos=True))
    assert batch.counted is not None
    tokenizer = tiny_tokenizer()
    said = [tokenizer.decode(row[marks]) for row, marks in zip(batch.ids, batch.counted, strict=True)]
    assert all(set(text.split()) == {"sat", "on", "a", "mat"} for text in said)
    assert not batch.counted[:, 0].any()
    assert fingerprint([batch]) != fingerprint(Calibration(rows, samples=2, length=24).batches(chatty(bos=True)))
    ragged = Calibration(rows, samples=3, length=24, mode="ragged", answers_only=True).batches(chatty())
    assert all(one.counted is not None and one.counted.any(1).all() for one in ragged)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_statistics_are_those_of_the_answers_rows(method):
    """What GPTQ sees of the first layer is the second moment of the answers' rows alone."""
    calibration = Calibration([{"messages": CHAT}] * 8, samples=4, length=24, answers_only=True)
    statistics, _ = collect(FAMILIES["llama"](), calibration=calibration, tokenizer=chatty())
    batches = calibration.batches(chatty())
    model = FAMILIES["llama"]()
    hidden = torch.cat([batch.ids[batch.counted] for batch in batches])
    rows = model.model.layers[0].input_layernorm(model.model.embed_tokens(hidden)).detach()
    found = statistics["model.layers.0.self_attn.q_proj"]
    assert found.tokens == (len(rows),)
    torch.testing.assert_close(found.results["hessian"], rows.T @ rows / len(rows), rtol=0.02, atol=0.02)  # products may round
    result = quantize(FAMILIES["llama"](), "w4a16", method=method, calibration=calibration, tokenizer=chatty())
    assert result.metadata["calibration"]["answers_only"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "autoround"}, "autoround learns from every token"),
        ({"steps": ["distill"]}, "distill learns from every token"),
        ({"scheme": "w8a8-static"}, "the static input scale of .* must see every token"),
        ({"calibration": Calibration([TEXT], samples=1, length=8, answers_only=True)}, "wants conversations, and this is text"),
    ],
)
def test_what_sees_every_token_does_not_go_with_answers_only(options, message):
    calibration = Calibration([{"messages": CHAT}] * 8, samples=4, length=24, answers_only=True)
    with pytest.raises(CalibrationError, match=message):
        quantize(FAMILIES["llama"](), **{"calibration": calibration, "tokenizer": chatty(), **options})
