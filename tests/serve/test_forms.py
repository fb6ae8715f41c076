"""Answers of a given form, over the real socket: JSON, schemas, tool calls, penalties, echo, log probabilities to the byte."""

import json
import time

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.generate import end_tokens
from quantkit.serve import grammar
from quantkit.serve.describe import describe
from quantkit.serve.forms import ChosenTool, Function, Named, Tool
from quantkit.serve.grammar import Grammars
from quantkit.serve.tools import HERMES, LLAMA, CallFinder, dialect_of, form_grammar
from quantkit.serve.wire import Chat, parse
from tests.serve.test_server import RunningServer
from tests.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} "
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}</tool_call>{% endfor %}. {% endfor %}"
)
CITY = {"type": "object", "properties": {"city": {"enum": ["Ur", "Rome"]}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = [{"role": "user", "content": "the dog"}]


@pytest.fixture(scope="module")
def running():
    with RunningServer(limits=Limits(running=8, kv_tokens=2048, waiting=300), drafter="ngram") as server:
        server.tokenizer.chat_template = TEMPLATE
        yield server


@pytest.fixture(scope="module")
def grammars():
    known = Grammars(tiny_tokenizer(), [2])
    yield known
    known.close()


def chat(running, **options):
    options = {"model": "tiny", "messages": ASK, "temperature": 2.0, "max_tokens": 60, **options}
    return running.client.chat.completions.create(**options)


@pytest.mark.parametrize("seed", range(3))
def test_answers_follow_a_schema(running, seed):
    schema = {**CITY, "properties": {**CITY["properties"], "on": {"const": None}}, "required": ["city", "on"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    for choice in chat(running, response_format=form, seed=seed, n=2).choices:
        found = json.loads(choice.message.content)
        assert found["city"] in ("Ur", "Rome")
        assert found["on"] is None
        assert choice.finish_reason == "stop"


def test_answers_are_objects(running):
    options = {
        "response_format": {"type": "json_object"},
        "logit_bias": {str(running.tokenizer.convert_tokens_to_ids("}")): 100},
    }
    assert json.loads(chat(running, **options).choices[0].message.content) == {}


def test_drafts_and_batches_change_no_answer_with_a_form(running):
    """Without a drafter, alone: the same; n-gram drafts of JSON that repeats itself are accepted meanwhile."""
    schema = {"type": "array", "items": {"enum": ["cat sat on", "a mat"]}, "minItems": 6, "maxItems": 6}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    asked = {"response_format": form, "temperature": 0, "max_tokens": 110, "messages": [{"role": "user", "content": "a"}]}
    asked["logit_bias"] = {str(running.tokenizer.convert_tokens_to_ids("Ċ")): -100}
    before = running.server.engine.stats["accepted"]
    drafted = chat(running, **asked, n=3)
    assert running.server.engine.stats["accepted"] > before
    with RunningServer(limits=Limits(running=1, kv_tokens=256)) as alone:
        alone.tokenizer.chat_template = TEMPLATE
        plain = chat(alone, **asked)
    assert {choice.message.content for choice in drafted.choices} == {plain.choices[0].message.content}
    assert len(json.loads(plain.choices[0].message.content)) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called(running, choice, stream):
    options = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "parallel_tool_calls": False, "seed": 1, "max_tokens": 90}
    if stream:
        chunks = [chunk.choices[0] for chunk in chat(running, stream=True, **options)]
        [call] = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert call.index == 0
        content, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        whole = chat(running, **options).choices[0]
        [call], content, reason = whole.message.tool_calls, whole.message.content, whole.finish_reason
    assert call.function.name in ("weather", "clock")
    if choice != "required":
        assert json.loads(call.function.arguments)["city"] in ("Ur", "Rome")
    assert call.id.startswith("call_")
    assert not content
    assert reason == "tool_calls"


def test_calls_and_results_go_back_to_the_model(running):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ur"}'}}
    said = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    said.append({"role": "tool", "tool_call_id": "call_1", "content": "rain"})
    assert chat(running, messages=said, tools=[WEATHER], tool_choice="none", max_tokens=3).choices[0].finish_reason == "length"


def fits(known, rules, text) -> bool:
    ids = [*tiny_tokenizer()(text)["input_ids"], 2]
    return known.constraint(rules).fitting(ids) == len(ids)


HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Ur"}}'


@pytest.mark.parametrize(
    ("dialect", "choice", "schema", "text", "good"),
    [
        (HERMES, "auto", None, "the cat", True),
        (HERMES, "auto", None, "the <tool cat", True),
        (HERMES, "auto", None, f"the {HERMES_CALL}\n{HERMES_CALL}", True),
        (HERMES, "auto", None, HERMES_CALL.replace("Ur", "Paris"), False),
        (HERMES, "auto", None, HERMES_CALL.replace("weather", "climate"), False),
        (HERMES, "required", None, HERMES_CALL, True),
        (HERMES, "required", None, "the cat", False),
        (HERMES, "auto", {"type": "array"}, "[1]", True),
        (HERMES, "auto", {"type": "array"}, HERMES_CALL, True),
        (HERMES, "auto", {"type": "array"}, "the cat", False),
        (HERMES, ChosenTool(type="function", function=Named(name="clock")), None, HERMES_CALL, False),
        (LLAMA, "auto", None, "the cat", True),
        (LLAMA, "auto", None, LLAMA_CALL, True),
        (LLAMA, "auto", None, LLAMA_CALL.replace("Ur", "Paris"), False),
        (LLAMA, "required", None, LLAMA_CALL, True),
        (LLAMA, "required", None, "the cat", False),
        (LLAMA, "auto", {"type": "array"}, "[1]", True),
    ],
)
def test_what_may_be_written_with_tools(grammars, dialect, choice, schema, text, good):
    tools = [Tool.model_validate(WEATHER), Tool.model_validate(CLOCK)]
    assert fits(grammars, form_grammar(dialect, tools, choice, schema, several=True), text) is good


def test_definitions_of_arguments_are_found(grammars):
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"const": 7}}}
    rules = form_grammar(
        LLAMA, [Tool(type="function", function=Function(name="f", parameters=parameters))], "auto", None, several=True
    )
    assert fits(grammars, rules, '{"name": "f", "parameters": {"a": 7}}')
    assert not fits(grammars, rules, '{"name": "f", "parameters": {"a": 8}}')


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_text_is_cut(size):
    text = f"a < b {HERMES_CALL}{HERMES_CALL} {HERMES_CALL[:30]}"
    finder, pieces = CallFinder(HERMES), [text[i : i + size] for i in range(0, len(text), size)]
    found = [finder.add(piece, last=False) for piece in pieces] + [finder.add("", last=True)]
    assert "".join(content for content, _ in found).split() == f"a < b {HERMES_CALL[:30]}".split()
    calls = [call for _, calls in found for call in calls]
    assert [call["index"] for call in calls] == [0, 1]
    assert {call["function"]["arguments"] for call in calls} == {'{"city": "Ur"}'}


def test_what_is_no_call_is_content():
    wrong = "<tool_call>[1]</tool_call> and more"
    assert CallFinder(HERMES).add(wrong, last=True) == (wrong, [])
    assert CallFinder(LLAMA).add("the cat", last=False) == ("the cat", [])
    assert CallFinder(LLAMA).add('{"city": "Ur"}', last=True) == ('{"city": "Ur"}', [])
    assert CallFinder(LLAMA).add(LLAMA_CALL, last=True)[1][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ tools }} [TOOL_CALLS]", "{{ tools }} <tool_call>f <arg_key>", None])
def test_templates_of_other_forms_are_refused(template):
    with pytest.raises(QuantkitError, match=r"^tools: the model's chat template"):
        dialect_of(template)


HOSTILE = {
    "hangs": ({"type": "integer", "multipleOf": 99999989}, "takes more than"),
    "no schema": ({"type": "cat"}, "cannot be used"),
    "somewhere else": ({"$ref": "https://example.com/a.json"}, "cannot be used"),
    "a file": ({"$ref": "file:///etc/passwd"}, "cannot be used"),
    "no expression": ({"type": "string", "pattern": "(("}, "cannot be used"),
    "large": ({"enum": ["a" * 70000]}, "more than 65536 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_and_others_served_meanwhile(running, monkeypatch, name):
    schema, message = HOSTILE[name]
    vet = running.server.runner.config.app.state.intake
    monkeypatch.setattr(grammar, "COMPILE_S", 1.0)
    if vet._grammars is not None:
        monkeypatch.setattr(vet._grammars._vet, "_seconds", 1.0)
    started = time.monotonic()
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    with pytest.raises(openai.BadRequestError, match=f"response_format: .*{message}"):
        chat(running, response_format=form)
    assert time.monotonic() - started < 60
    assert json.loads(
        chat(running, response_format={"type": "json_schema", "json_schema": {"schema": CITY}}).choices[0].message.content
    )


def test_a_form_that_cannot_be_kept_is_refused(running):
    with pytest.raises(openai.BadRequestError, match="min_tokens: the form"):
        chat(running, response_format={"type": "json_object"}, extra_body={"min_tokens": 3})
    deep = {"type": "object"}
    for _ in range(120):
        deep = {"type": "array", "items": deep}
    with pytest.raises(openai.BadRequestError):
        chat(running, response_format={"type": "json_schema", "json_schema": {"schema": {"const": 1, "minLength": -1}}})
    assert chat(running, response_format={"type": "json_schema", "json_schema": {"schema": deep}}, max_tokens=5).choices


def test_a_tokenizer_that_cannot_be_read_is_the_reason():
    class Slow:
        pass

    with pytest.raises(QuantkitError, match="not a fast tokenizer"):
        Grammars(Slow(), [2])
    with pytest.raises(QuantkitError, match="no end-of-sequence token"):
        Grammars(tiny_tokenizer(), [])
    assert end_tokens(tiny_llama()) == [2]


def test_a_grammar_that_fails_midway_ends_its_request_only(running, monkeypatch):
    monkeypatch.setattr(grammar.Grammar, "error", QuantkitError("too complicated"))
    monkeypatch.setattr(grammar.Grammar, "allowed", lambda self, drafts: np.zeros((1 + len(drafts), 24), "uint8"))
    with pytest.raises(openai.InternalServerError, match="too complicated"):
        chat(running, response_format={"type": "json_object"})
    assert chat(running, max_tokens=3).choices[0].finish_reason == "length"


def complete(running, **options):
    return running.client.completions.create(model="tiny", temperature=0, **options)


def test_the_prompt_is_repeated_with_its_log_probabilities(running):
    both = complete(running, prompt="the cat sat", echo=True, logprobs=2, max_tokens=4).choices[0]
    plain = complete(running, prompt="the cat sat", logprobs=2, max_tokens=4).choices[0]
    assert both.text == "the cat sat" + plain.text
    assert both.logprobs.token_logprobs[-4:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-5)
    assert both.logprobs.token_logprobs[0] is None
    assert [both.text[at:].startswith(token) for at, token in zip(both.logprobs.text_offset, both.logprobs.tokens, strict=True)]
    assert "".join(both.logprobs.tokens[:-4]) == "the cat sat"
    ids = running.tokenizer("the cat sat")["input_ids"]
    for cut in range(1, len(ids)):  # what each token of the prompt has is what it has as an answer
        bias = {str(ids[cut]): 100}
        one = complete(running, prompt=ids[:cut], logprobs=0, max_tokens=1, logit_bias=bias).choices[0]
        assert one.logprobs.token_logprobs[0] == pytest.approx(both.logprobs.token_logprobs[cut], abs=1e-4)


def test_the_prompt_alone(running):
    only = complete(running, prompt=[[5, 6], [7]], echo=True, logprobs=0, max_tokens=0)
    assert [choice.text for choice in only.choices] == [running.tokenizer.decode(ids) for ids in ([5, 6], [7])]
    assert [choice.finish_reason for choice in only.choices] == ["length", "length"]
    assert only.usage.completion_tokens == 0
    chunks = list(complete(running, prompt="the cat", echo=True, logprobs=0, max_tokens=2, stream=True))
    whole = complete(running, prompt="the cat", echo=True, logprobs=0, max_tokens=2).choices[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert [p for c in chunks for p in c.choices[0].logprobs.token_logprobs] == pytest.approx(whole.logprobs.token_logprobs)
    assert [at for c in chunks for at in c.choices[0].logprobs.text_offset] == whole.logprobs.text_offset
    with pytest.raises(openai.BadRequestError, match="max_tokens: without echo"):
        complete(running, prompt="the cat", max_tokens=0)


def test_bytes_of_tokens_are_those_of_the_text(running):
    free = chat(running, max_tokens=20, logprobs=True, top_logprobs=3, seed=3).choices[0]
    spelled = b"".join(bytes(entry.bytes or ()) for entry in free.logprobs.content)
    assert spelled.decode() == free.message.content
    assert all(
        bytes(top.bytes).decode() == top.token for entry in free.logprobs.content for top in entry.top_logprobs if top.bytes
    )


def test_penalties_count_the_answer_and_biases_decide(running):
    free = complete(running, prompt="a dog", max_tokens=24).choices[0]
    for name in ("frequency_penalty", "presence_penalty"):
        assert complete(running, prompt="a dog", max_tokens=24, **{name: 2.0}).choices[0].text != free.text
    token = running.tokenizer.convert_tokens_to_ids("x")
    forced = complete(running, prompt="a dog", max_tokens=5, logit_bias={str(token): 100}).choices[0]
    assert forced.text == "xxxxx"
    with pytest.raises(openai.BadRequestError, match="logit_bias has token 500"):
        complete(running, prompt="a", max_tokens=1, logit_bias={"500": 1})


def test_the_log_has_a_line_for_each_request_and_no_content(running, caplog):
    with caplog.at_level("INFO", logger="quantkit.serve.requests"):
        complete(running, prompt="the cat", max_tokens=3)
        list(complete(running, prompt="the cat", max_tokens=3, stream=True))
        httpx.post(f"{running.url}/v1/completions", json={"prompt": 5})
        running.settle()
        time.sleep(0.1)
    lines = [record.getMessage() for record in caplog.records if record.name == "quantkit.serve.requests"]
    assert len(lines) == 3
    assert all("127.0.0.1 POST '/v1/completions' " in line and "cat" not in line for line in lines)
    assert " 200 " in lines[0]
    assert " + 3 tokens, length, first token" in lines[1]
    assert " 400 " in lines[2]


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({"top_logprobs": 2}, False),
        ({"top_logprobs": 2, "logprobs": False}, False),
        ({"top_logprobs": 2, "logprobs": True}, True),
        ({"top_logprobs": 0}, True),
        ({"top_logprobs": None}, True),
        ({}, True),
    ],
)
def test_the_description_and_the_server_agree_on_what_top_logprobs_needs(asked, taken):
    body = {"messages": [{"role": "user", "content": "a"}], **asked}
    described = jsonschema.Draft202012Validator({**describe(), "$ref": "#/components/schemas/Chat"})
    assert described.is_valid(body) == taken
    if taken:
        assert parse(body, Chat).num_logprobs == (asked["top_logprobs"] if asked.get("logprobs") else None)
    else:
        with pytest.raises(QuantkitError, match="top_logprobs: needs logprobs: true"):
            parse(body, Chat)
