"""Conversations whose messages are lists of parts, templates that read only text or only parts, and rows in disguise."""

import json

import pytest

from quantkit.calibrate.chat import Chat
from quantkit.calibrate.texts import load_texts, read_texts
from quantkit.errors import CalibrationError
from tests.tiny import tiny_tokenizer

TEXT_ONLY = "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}"
AS_JSON = "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}"
AS_JSON += "{% endif %} . {% endfor %}"
STRICT = "{% for m in messages %}{{ m.role + ' : ' + m.content + ' . ' }}{% endfor %}"
PARTS_ONLY = "{% for m in messages %}{{ m.role }} : {% for part in m.content %}{{ part.text }}{% endfor %} . {% endfor %}"
BOTH = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %} . {% endfor %}"
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
SAID = "user : the cat . assistant : sat on a mat . "


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def chatty(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [TEXT_ONLY, AS_JSON, STRICT, PARTS_ONLY, BOTH])
@pytest.mark.parametrize("content", ["the cat", in_parts("the cat"), [{"type": "input_text", "text": "the cat"}], ["the cat"]])
def test_a_template_gets_what_it_can_read(template, content):
    row = {"messages": [{"role": "user", "content": content}, CHAT[1]]}
    found = read_texts([row], tokenizer=chatty(template)).passages[0]
    assert found.text == SAID
    (first, last), *more = found.answers
    assert (found.text[first:last], more) == ("sat on a mat", [])


def test_several_parts_are_lines_where_a_template_reads_text_only():
    row = {"messages": [{"role": "user", "content": in_parts("the", "cat")}]}
    assert load_texts([row], tokenizer=chatty(TEXT_ONLY)) == ["user : the\ncat . "]
    assert load_texts([row], tokenizer=chatty(BOTH)) == ["user : thecat . "]


def test_answers_in_parts_are_found():
    said = [CHAT[0], {"role": "assistant", "content": in_parts("sat", "on a mat")}]
    for template in (TEXT_ONLY, BOTH):
        found = read_texts([{"messages": said}], tokenizer=chatty(template)).passages[0]
        assert [found.text[first:last] for first, last in found.answers] == ["sat", "on a mat"]


def test_a_template_is_asked_once():
    asked = []

    class Counting:
        chat_template = "some"

        def apply_chat_template(self, messages, **options):
            asked.append(messages)
            return messages[0]["content"]

    chat = Chat(Counting())
    for _ in range(3):
        chat.render(CHAT, None, "row")
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "row 2, message 1: its content is a int, want text or a list"),
        ({"text": "the cat"}, "message 1: its content is a dict"),
        ([*in_parts("the cat"), {"type": "image", "url": "x.png"}], "part 2 of its content is of type 'image'.*remove the row"),
        ([{"type": "text"}], "part 1 of its content is without text"),
        ([["the cat"]], "part 1 of its content is without text"),
    ],
)
def test_what_is_no_text_is_named_by_row(content, message):
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": content}]}]
    with pytest.raises(CalibrationError, match=message):
        load_texts(rows, tokenizer=chatty(BOTH))


@pytest.mark.parametrize("said", [CHAT, [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat on a mat"}]])
def test_conversations_written_as_json_are_read_where_the_column_is_named(said):
    rows = [{"id": 1, "chat": json.dumps(said)}]
    assert load_texts(rows, column="chat", tokenizer=chatty(BOTH)) == [SAID]
    with pytest.raises(CalibrationError, match=r"is a conversation written as JSON, want text; .*column='chat'"):
        load_texts(rows, tokenizer=chatty(BOTH))
    with pytest.raises(CalibrationError, match=r"row 2: it is a conversation written as JSON, want text; .*json.loads"):
        load_texts(["the cat", json.dumps({"messages": said})], tokenizer=chatty(BOTH))


def test_json_that_is_no_conversation_stays_text():
    texts = ['{"from": "here", "to": "there"}', '[{"role": "king"}]', "[the cat]", '{"messages": 3}', "[]"]
    assert load_texts(texts) == texts
    assert load_texts([{"text": text} for text in texts]) == texts


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "a"}, {"text": "b"}])[:-3],
        json.dumps([[{"role": "user", "content": "a"}]]),
        json.dumps({"text": "a"}, indent=1) + "\n" + json.dumps({"text": "b"}, indent=1),
        "\ufeff\n\n" + json.dumps({"text": "a"}),
    ],
)
def test_rows_named_as_text_are_refused_in_any_shape(tmp_path, content):
    (tmp_path / "rows.txt").write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"named as text and holds JSON; name it .jsonl or .json"):
        load_texts(tmp_path / "rows.txt")


@pytest.mark.parametrize("text", ["{the cat}", "[1, 2]", "{}", "[{ sat", "{" * 5000])
def test_text_with_brackets_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert load_texts(tmp_path / "a.txt") == [text]


def test_blank_lines_between_rows_of_a_json_file(tmp_path):
    rows = [json.dumps({"text": text}) for text in ("a", "b", "c")]
    (tmp_path / "a.json").write_text("\n" + "\n\n".join(rows) + "\n \n")
    assert load_texts(tmp_path / "a.json") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "head", "mark"), [("a.csv", "id;text", ";"), ("a.csv", "id\ttext", r"\\t"), ("a.tsv", "id,text", ",")]
)
def test_a_table_parted_by_another_mark_is_named(tmp_path, name, head, mark):
    (tmp_path / name).write_text(f"{head}\n1{head[2]}the cat\n")
    with pytest.raises(CalibrationError, match=f"the first line is one column, .* parted by '{mark}', want"):
        load_texts(tmp_path / name)
