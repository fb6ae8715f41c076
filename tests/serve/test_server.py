"""The server over a real socket, with the real openai client, and with clients that behave badly."""

import asyncio
import gc
import re
import socket
import threading
import time

import httpx
import openai
import pytest
import torch

from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine
from quantkit.generation.generate import generate
from quantkit.serve.run import check_port, open_server, run_server
from quantkit.serve.worker import Worker
from tests.tiny import tiny_llama, tiny_tokenizer

JSON = {"Content-Type": "application/json"}
LIMITS = Limits(running=8, kv_tokens=1024, waiting=300, step_tokens=64)


class RunningServer:
    """A server on a free port, for the length of a with block."""

    def __init__(self, **options) -> None:
        self.model, self.tokenizer = tiny_llama(), tiny_tokenizer()
        self.tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.role }} {{ m.content }} . {% endfor %}"
        options = {"limits": LIMITS, **options}
        self.server = open_server(self.model, self.tokenizer, name="tiny", port=0, **options)
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.thread = threading.Thread(target=run_server, args=(self.server,), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.runner.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error) -> None:
        self.server.runner.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def settle(self) -> None:
        """Wait until nothing runs."""
        until = time.monotonic() + 20
        worker = self.server.runner.config.app.state.worker
        while (self.server.engine.busy or worker.unfinished) and time.monotonic() < until:
            time.sleep(0.01)
        assert not self.server.engine.busy
        assert not worker.unfinished
        assert self.server.engine.scheduler.pages.used == 0


@pytest.fixture(scope="module")
def running():
    with RunningServer() as server:
        yield server


def expected(running, prompt, **options):
    return generate(tiny_llama(), prompt, running.tokenizer, **options)


def test_completions_are_what_generate_says(running):
    want = expected(running, "the cat sat", max_new_tokens=12)
    done = running.client.completions.create(model="tiny", prompt="the cat sat", max_tokens=12, temperature=0)
    assert done.choices[0].text == want.text
    assert done.choices[0].finish_reason == want.finish_reason == "length"
    assert done.usage.prompt_tokens == want.prompt_tokens
    assert done.usage.completion_tokens == 12
    ids = running.tokenizer("the cat sat")["input_ids"]
    several = running.client.completions.create(model="tiny", prompt=[ids, [5, 6]], max_tokens=12, temperature=0)
    assert [choice.text for choice in several.choices] == [want.text, expected(running, [5, 6], max_new_tokens=12).text]


def test_chat_streams_with_usage(running):
    messages = [{"role": "system", "content": "sing"}, {"role": "user", "content": [{"type": "text", "text": "the dog"}]}]
    want = expected(running, [{"role": "system", "content": "sing"}, {"role": "user", "content": "the dog"}], max_new_tokens=20)
    stream = running.client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == want.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == want.finish_reason
    assert chunks[-1].usage.completion_tokens == len(want.ids)
    assert len(chunks) > 5
    whole = running.client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
    assert whole.choices[0].message.content == want.text


def test_seeds_choices_stops_and_logprobs(running):
    ask = lambda **options: running.client.completions.create(model="tiny", prompt="a dog", max_tokens=24, **options)  # noqa: E731
    first, second = ask(seed=5, n=3), ask(seed=5, n=3)
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == 3
    free = ask(temperature=0).choices[0].text
    stopped = ask(temperature=0, stop=[free[5:8]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (free[: free.index(free[5:8])], "stop")
    found = ask(temperature=0, logprobs=2).choices[0].logprobs
    assert len(found.tokens) == 24
    assert all(
        row and max(row.values()) == pytest.approx(value)
        for row, value in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    chat = running.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert [len(entry.top_logprobs) for entry in chat.choices[0].logprobs.content] == [2, 2, 2]
    assert chat.choices[0].logprobs.content[0].logprob <= 0
    penalised = ask(temperature=0, extra_body={"repetition_penalty": 4.0, "min_tokens": 3})
    assert penalised.choices[0].text != free


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"prompt": "the cat " * 400}, 400, "prompt tokens and max_new_tokens=4 make"),
        ({"prompt": [500]}, 400, "token ids from 500 to 500"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"max_tokens": 1000}, 400, "more than the limit of 128"),
        ({"max_tokens": 0}, 400, "max_tokens: .*greater than or equal to 1; got 0"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"functions": [{"name": "f"}]}, 400, "functions: this server does not support"),
        ({"tempurature": 1.0}, 400, "did you mean 'temperature'"),
        ({"presence_penalty": 2.5}, 400, "presence_penalty"),
        ({"stop": [""]}, 400, "empty string"),
        ({"model": "gpt-9"}, 404, "this server has 'tiny'"),
        ({"prompt": "x" * 1100000}, 413, "more than 1048576 bytes"),
    ],
)
def test_bad_requests_are_answered_with_the_reason(running, change, status, message):
    answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 4, **change})
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"]["message"])


@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b"[" * 100000, b'{"a": "\\ud83d"}'])
def test_malformed_bodies_are_refused(running, body):
    answer = httpx.post(f"{running.url}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_health_models_and_metrics(running):
    running.client.completions.create(model="tiny", prompt="a", max_tokens=3)
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    assert [model.id for model in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        running.client.models.retrieve("someone/other")
    with pytest.raises(openai.NotFoundError, match="has no /v1/embeddings: embeddings need a model"):
        running.client.embeddings.create(model="tiny", input="a")
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["quantkit_tokens_total"]) >= 3
    assert float(values["quantkit_pages"]) == 32
    assert (
        float(values['quantkit_first_token_seconds_bucket{le="+Inf"}'])
        == float(values["quantkit_first_token_seconds_count"])
        > 0
    )
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} == {
        line.split()[2] for line in lines if line.startswith("# HELP")
    }


def test_small_pieces_are_sent_at_once(running):
    """Nagle's algorithm would hold back each piece of a stream until the one before it is acknowledged, 40 ms later."""
    with httpx.Client() as client:
        client.get(f"{running.url}/health")
        connections = list(running.server.runner.server_state.connections)
        sockets = [one.transport.get_extra_info("socket") for one in connections if one.transport is not None]
        assert sockets
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


def test_a_token_is_asked_for():
    with RunningServer(token="s3cret") as running:
        with pytest.raises(openai.AuthenticationError, match="needs a token"):
            running.client.models.list()
        for given in ("Bearer wrong", "s3cret", "Basic s3cret", "Bearer \xfc"):
            headers = {"Authorization": given.encode("latin-1")}
            assert httpx.get(f"{running.url}/metrics", headers=headers).status_code == 401
        good = openai.OpenAI(base_url=f"{running.url}/v1", api_key="s3cret", max_retries=0)
        assert good.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_clients_beyond_the_limits_are_told_to_wait():
    slow = Limits(running=1, kv_tokens=128, waiting=1)
    with RunningServer(limits=slow) as running:

        async def flood() -> list[int]:
            async with httpx.AsyncClient(timeout=60) as client:
                body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
                answers = await asyncio.gather(*(client.post(f"{running.url}/v1/completions", json=body) for _ in range(12)))
                return [answer.status_code for answer in answers]

        codes = asyncio.run(flood())
        assert set(codes) == {200, 429}


def test_when_the_model_fails_the_request_ends_and_the_server_goes_on():
    with RunningServer(engine="modules") as running:
        calls = []

        def fail(module, args):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of something")

        hook = running.model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(openai.InternalServerError, match="out of something"):
            running.client.completions.create(model="tiny", prompt="a", max_tokens=20, temperature=0)
        hook.remove()
        want = expected(running, "a", max_new_tokens=20).text
        assert running.client.completions.create(model="tiny", prompt="a", max_tokens=20, temperature=0).choices[0].text == want
        running.settle()


async def one_client(client: httpx.AsyncClient, url: str, number: int) -> str:
    body = {"prompt": [5 + number % 90, 7, number % 11 + 3], "max_tokens": 60, "stream": number % 3 > 0, "ignore_eos": True}
    body |= {"temperature": 0.9, "seed": number}
    leaves = number % 2 == 0
    if not body["stream"]:
        try:
            answer = await client.post(f"{url}/v1/completions", json=body, timeout=0.4 if leaves else 120)
        except httpx.ReadTimeout:
            return "left"
        return "whole" if answer.status_code == 200 else f"status {answer.status_code}"
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        async for line in answer.aiter_lines():
            text += line
            if leaves and len(text) > 300:
                return "left"
    return "whole" if text.endswith("[DONE]") else "cut"


def test_200_clients_half_of_which_leave_and_nothing_leaks():
    with RunningServer() as running:
        engine = running.server.engine

        async def storm() -> list[str]:
            limits = httpx.Limits(max_connections=200)
            async with httpx.AsyncClient(limits=limits) as client:
                return await asyncio.gather(*(one_client(client, running.url, i) for i in range(200)))

        def tensors() -> int:
            gc.collect()
            return sum(1 for found in gc.get_objects() if type(found) is torch.Tensor)

        asyncio.run(one_round(running.url))
        running.settle()
        before = tensors()
        results = asyncio.run(storm())
        assert results.count("whole") >= 100
        assert results.count("left") >= 60
        assert set(results) <= {"whole", "left"}
        running.settle()
        assert engine.scheduler.pages.used == 0
        assert tensors() <= before + 8
        finished = {reason: engine.stats[reason] for reason in ("stop", "length", "cancelled", "error")}
        assert sum(finished.values()) == engine.stats["requests"] >= 150
        assert finished["cancelled"] > 0 == finished["error"]


async def one_round(url: str) -> None:
    async with httpx.AsyncClient() as client:
        assert await one_client(client, url, 1) == "whole"


def test_what_cannot_be_served_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(QuantkitError, match="cannot listen on 127"):
            open_server(tiny_llama(), tiny_tokenizer(), port=taken.getsockname()[1])
        with pytest.raises(QuantkitError, match="in use; give another"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(QuantkitError, match="needs a tokenizer"):
        open_server(tiny_llama(), None)
    for options, message in (
        ({"port": 70000}, "0 to 65535"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such"),
        ({"origins": ["localhost"]}, "want scheme, host and port"),
        ({"origins": ["http://a/b"]}, "want scheme, host and port"),
    ):
        with pytest.raises(QuantkitError, match=message):
            open_server(tiny_llama(), tiny_tokenizer(), **{"port": 0, **options})


def test_what_comes_after_the_end_of_the_engine_hears_of_it() -> None:
    worker = Worker(Engine(tiny_llama(), limits=LIMITS), tiny_tokenizer())
    entered, leave = threading.Event(), threading.Event()
    held = worker.call(lambda: (entered.set(), leave.wait(20)))
    assert entered.wait(20)
    closer = threading.Thread(target=worker.close)
    closer.start()
    while not worker._calls.qsize():
        time.sleep(0.001)
    queued = worker.call(lambda: 1)  # behind the order to end
    leave.set()
    closer.join(20)
    assert held.result(20)
    for future in (queued, worker.call(lambda: 2)):
        with pytest.raises(QuantkitError, match="closed"):
            future.result(20)
