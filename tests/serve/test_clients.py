"""What ordinary clients send: every field they know, null where it is not set, and their own messages back again."""

import json

import httpx
import openai
import pytest

from quantkit.errors import QuantkitError
from quantkit.serve.wire import BadField, Chat, Completion, parse
from tests.serve.test_server import RunningServer

SAID = [
    {"role": "developer", "content": "sing"},
    {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "dog", "annotations": []}]},
    {"role": "user", "content": "a", "name": "me"},
    {
        "role": "assistant", "content": None, "refusal": None, "tool_calls": None, "audio": None, "function_call": None,
        "annotations": [],
    },
    {"role": "assistant", "content": "ran", "refusal": None, "tool_calls": []},
    {"role": "user", "content": ""},
]  # fmt: skip

NOTHING = {
    "temperature": None, "top_p": None, "n": None, "stop": None, "seed": None, "stream": None, "stream_options": None,
    "max_tokens": None, "max_completion_tokens": None, "tools": None, "tool_choice": None, "response_format": None,
    "logit_bias": None, "store": None, "user": None, "metadata": None, "logprobs": None, "top_logprobs": None,
    "presence_penalty": None, "frequency_penalty": None, "service_tier": None, "parallel_tool_calls": None, "functions": None,
    "function_call": None, "audio": None, "modalities": None, "prediction": None, "reasoning_effort": None, "verbosity": None,
    "web_search_options": None, "never_heard_of": None, "top_k": None, "min_p": None, "repetition_penalty": None,
}  # fmt: skip

HARMLESS = [
    ("tools", []), ("functions", []), ("tool_choice", "none"), ("tool_choice", "auto"), ("function_call", "none"),
    ("response_format", {"type": "text"}), ("logit_bias", {}), ("logit_bias", {"50256": 0}), ("store", True), ("store", False),
    ("user", "someone"), ("user", ""), ("metadata", {"a": "b"}), ("metadata", {}), ("parallel_tool_calls", True),
    ("parallel_tool_calls", False), ("service_tier", "auto"), ("safety_identifier", "x"), ("prompt_cache_key", "x"),
    ("prediction", {"type": "content", "content": "x"}), ("modalities", ["text"]), ("verbosity", "medium"),
    ("reasoning_effort", "none"), ("presence_penalty", 0), ("frequency_penalty", 0.0), ("top_k", -1), ("top_k", 0),
    ("seed", -1), ("seed", -7), ("seed", 2**64), ("top_p", 0), ("top_p", 1), ("min_p", 0), ("stop", []), ("stop", ""), ("n", 1),
    ("stream_options", {"include_usage": True, "include_obfuscation": True}), ("stream_options", {"include_usage": None}),
    ("skip_special_tokens", True), ("length_penalty", 1.0), ("use_beam_search", False), ("stop_token_ids", []),
    ("add_generation_prompt", True), ("best_of", 1), ("logprobs", False), ("top_logprobs", 0), ("temperature", 0),
    ("model", ""),
]  # fmt: skip

CHANGING = [
    ("tools", [{"type": "function", "function": {"name": "f g"}}]), ("tool_choice", "required"), ("functions", [{"name": "f"}]),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_object", "json_schema": {"schema": {}}}), ("response_format", "json_object"),
    ("response_format", {"type": "grammar"}), ("tools", [{"type": "retrieval"}]), ("tools", "f"), ("parallel_tool_calls", 1),
    ("logit_bias", {"5": 101}), ("logit_bias", {"five": 1}), ("logit_bias", {"-5": 1}), ("logit_bias", [5]),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"), ("verbosity", "low"), ("web_search_options", {}), ("audio", {"voice": "alloy"}),
    ("best_of", 3), ("use_beam_search", True), ("stop_token_ids", [5]), ("length_penalty", 2), ("skip_special_tokens", False),
    ("guided_json", {"type": "object"}), ("chat_template_kwargs", {"enable_thinking": False}), ("never_heard_of", 1),
    ("stream_options", {"never_heard_of": 1}), ("top_k", -2), ("n", 0), ("n", 17), ("temperature", True), ("stream", "yes"),
    ("temperature", float("nan")), ("stop", {"a": 1}), ("stop", {}), ("stop", 0), ("stop", False), ("presence_penalty", False),
    ("frequency_penalty", float("nan")), ("best_of", True), ("logit_bias", {"5": False}), ("top_logprobs", 3),
    ("moderation", {}), ("seed", 1.5), ("suffix", "x"), ("echo", True),
]  # fmt: skip


@pytest.fixture(scope="module")
def running():
    with RunningServer() as server:
        yield server


def answer(running, **body) -> str:
    body = {"messages": [{"role": "user", "content": "the dog"}], "max_tokens": 8, "temperature": 0, **body}
    found = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["message"]["content"]


def test_null_means_absent(running):
    plain = {"messages": [{"role": "user", "content": "the dog"}], "model": "tiny"}
    ignored = json.loads(json.dumps(NOTHING | plain))
    assert parse(ignored, Chat) == parse(plain, Chat)
    assert answer(running, **{k: v for k, v in NOTHING.items() if k not in ("temperature", "max_tokens")}) == answer(running)


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_values_that_ask_for_nothing_are_accepted(running, name, value):
    assert answer(running, **{name: value}) == answer(running)


@pytest.mark.parametrize(("name", "value"), CHANGING)
def test_what_would_change_the_answer_is_refused_by_name(name, value):
    with pytest.raises(QuantkitError, match=f"^{name}"):
        parse({"messages": [{"role": "user", "content": "a"}], name: value}, Chat).sampling(0)


@pytest.mark.parametrize(("seed", "same"), [(-1, False), (-2, True), (2**63, True), (0, True)])
def test_the_seed_minus_one_is_a_random_one(running, seed, same):
    ask = {"temperature": 3.0, "max_tokens": 40, "seed": seed, "ignore_eos": True}
    assert (answer(running, **ask) == answer(running, **ask)) is same


def test_top_p_zero_takes_the_most_likely_token(running):
    assert answer(running, temperature=2.0, top_p=0) == answer(running)


@pytest.mark.parametrize(("prompt", "count"), [("a", 1), (["a", "b"], 2), ([5, 6], 1), ([[5], [6, 7]], 2), ([], 1)])
def test_prompts_of_every_kind(prompt, count):
    asked = parse({"prompt": prompt, "suffix": "", "echo": False, "best_of": 1, "logprobs": None}, Completion)
    assert len(asked.prompt) == count


@pytest.mark.parametrize("prompt", [None, 5, {"a": 1}, [None], ["a", 1], [[1], "a"], [1.5], [True], [["a"]]])
def test_prompts_of_no_kind(prompt):
    with pytest.raises(BadField, match=r"^prompt: "):
        parse({"prompt": prompt}, Completion)


def test_dumped_messages_are_the_same_messages(running):
    client = running.client
    first = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the dog"}], max_tokens=6, seed=1
    )
    said = first.choices[0].message
    messages = [{"role": "user", "content": "the dog"}, said.model_dump(), {"role": "user", "content": "and"}]
    short = [messages[0], {"role": "assistant", "content": said.content}, messages[2]]
    ask = lambda messages: client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)  # noqa: E731
    assert ask(messages).choices[0].message == ask(short).choices[0].message
    assert ask(messages).usage.prompt_tokens == ask(short).usage.prompt_tokens
    assert ask(SAID).choices[0].message.content


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user"}, "messages.0: a message of role user needs content"),
        ({"role": "user", "content": None}, "messages.0: a message of role user needs content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0: image_url parts",
        ),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "messages.0.audio"),
        ({"role": "wizard", "content": "a"}, "messages.0.role"),
        ({"content": "a"}, "messages.0.role"),
        ("a", "messages.0"),
    ],
)
def test_messages_that_cannot_be_read_are_named(message, reason):
    with pytest.raises(BadField) as raised:
        parse({"messages": [message]}, Chat)
    assert str(raised.value).startswith(reason)


def test_tool_calls_and_results_reach_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    odd = {"id": "2", "type": "function", "function": {"name": "add", "arguments": "not JSON"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call, odd]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "function", "name": "add", "content": "2"},
    ]
    first, second, third = (message.plain() for message in parse({"messages": messages}, Chat).messages)
    assert first["content"] == ""
    assert first["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert first["tool_calls"][1] == odd
    assert second == {"role": "tool", "content": "2", "tool_call_id": "1"}
    assert third == {"role": "tool", "content": "2", "name": "add"}


def test_a_template_without_tool_calls_says_so(running):
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    ]
    with pytest.raises(openai.BadRequestError, match="knows no tool calls"):
        running.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    messages = [{"role": "tool", "tool_call_id": "1", "content": "2"}]
    assert running.client.chat.completions.create(model="tiny", messages=messages, max_tokens=2).choices


def test_a_template_that_refuses_a_role_is_the_reason(running, monkeypatch):
    monkeypatch.setattr(running.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(openai.BadRequestError, match="roles must alternate"):
        running.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


def test_half_of_an_emoji_is_refused_with_the_reason(running):
    body = '{"messages": [{"role": "user", "content": "\\ud83d"}]}'
    found = httpx.post(f"{running.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert "surrogate" in found.json()["error"]["message"]


@pytest.mark.parametrize("name", ["n", "max_tokens", "seed", "top_k", "min_tokens", "logprobs"])
def test_a_number_without_a_fraction_is_an_integer_in_json(name):
    value = 3.0 if name != "min_tokens" else 0.0
    found = getattr(parse({"prompt": "a", name: value}, Completion), name)
    assert (found, type(found)) == (int(value), int)
    with pytest.raises(BadField, match=name):
        parse({"prompt": "a", name: 2.5}, Completion)
    with pytest.raises(BadField, match=name):
        parse({"prompt": "a", name: True}, Completion)
