"""Requests that take much for little, web pages behind their readers' backs, and the end of a server with clients."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from quantkit.serve.guard import host_name, is_local
from quantkit.serve.reply import Reply, written
from tests.serve.test_server import JSON, LIMITS, RunningServer

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def running():
    with RunningServer(origins=["http://localhost:3000"], hosts=["Chat.example"]) as server:
        yield server


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ["a"] * 150_000, "n": 16}, 400, "asks for 2400000 answers, the limit is 256"),
        ({"prompt": [[1]] * 257}, 400, "asks for 257 answers"),
        ({"prompt": ["a", 1] * 100_000}, 400, "prompt: want text"),
        ({"prompt": "the cat " * 120_000}, 400, "960000 characters, more than the 128 tokens"),
        ({"prompt": [5] * 200_000}, 400, "200000 prompt tokens and"),
        ({"prompt": "a", "stop": "x" * 900_000}, 400, "stop: 900000 characters"),
        ({"prompt": "a", "stop": ["ab"] * 5000}, 400, "stop: 5000 strings"),
        ({"prompt": "a", "stop": [1] * 50_000}, 400, "more than 32768 values|want a string"),
        ({"prompt": "a", "metadata": {str(i): i for i in range(50_000)}}, 400, "more than 32768 values"),
        ({"prompt": "a", **{f"field{i}": 1 for i in range(30_000)}}, 400, "field0: quantkit does not know"),
        ({"prompt": "a", "x" * 500_000: 1}, 400, "x: quantkit does not know|x\\.\\.\\.: quantkit does not know"),
        ({"prompt": "a", "seed": 10**300, "top_k": 10**300}, 200, ""),
        ({"prompt": "a", "max_tokens": 10**300}, 400, "more than the limit"),
        ({"prompt": "a", "temperature": 10**300}, 400, "temperature"),
        ({"prompt": "a", "repetition_penalty": 1e-300}, 400, "repetition_penalty=1e-300: want a number from 0.01"),
        ({"prompt": "a", "temperature": 1e-45}, 200, ""),
    ],
)
def test_what_is_too_much_is_refused_with_the_reason(running, body, status, message):
    content = json.dumps({"max_tokens": 2, **body})
    answer = httpx.post(f"{running.url}/v1/completions", content=content, headers=JSON, timeout=60)
    assert answer.status_code == status, answer.text
    text = answer.json()["error"]["message"] if status != 200 else ""
    assert re.search(message, text)
    assert len(text) < 3000


def test_others_are_answered_meanwhile(running, monkeypatch):
    monkeypatch.setattr("quantkit.serve.intake.SHORT_CHARACTERS", 1 << 20)  # so that text is split into tokens
    slowest, asked, done = 0.0, 0, threading.Event()

    def watch() -> None:
        nonlocal slowest, asked
        with httpx.Client() as client:
            while not done.is_set():
                started = time.perf_counter()
                assert client.get(f"{running.url}/health").status_code == 200
                slowest, asked = max(slowest, time.perf_counter() - started), asked + 1
                time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for body in ({"prompt": ["a"] * 150_000, "n": 16}, {"prompt": "the cat " * 100_000}, {"prompt": "a" * 500_000}):
        assert httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).status_code == 400
    done.set()
    watcher.join()
    assert asked > 5
    assert slowest < 1  # on a busy machine; alone it is a few milliseconds


def test_large_bodies_do_not_hold_up_small_ones(running, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    intake = running.server.runner.config.app.state.intake
    encode = intake._encode

    def slow(asked):
        if len(asked.prompt[0]) > 100_000:
            entered.set()
            leave.wait(20)
        return encode(asked)

    monkeypatch.setattr(intake, "_encode", slow)
    body = {"prompt": [3] * 120_000, "max_tokens": 1}
    large = threading.Thread(target=lambda: httpx.post(f"{running.url}/v1/completions", json=body, timeout=60))
    large.start()
    assert entered.wait(20)
    small = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=20)
    leave.set()
    large.join()
    assert small.status_code == 200


def test_bodies_beyond_the_budget_are_told_to_wait(running, monkeypatch):
    monkeypatch.setattr("quantkit.serve.intake.BUSY_BYTES", 100)
    answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a" * 200})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    monkeypatch.undo()
    assert httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [("1048577", b"413"), ("9" * 20, b"413"), ("9" * 300, b"400"), ("0001048577", b"413"), ("1048576", b"100"), ("-1", b"400")],
)
def test_a_body_that_is_announced_as_too_large_is_not_waited_for(running, length, status):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as client:
        client.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert client.recv(4096).split()[1] == status


def test_a_body_that_never_ends_is_given_up(running, monkeypatch):
    monkeypatch.setattr("quantkit.serve.intake.BODY_S", 0.1)

    async def stuck():
        yield b'{"prompt": '
        await asyncio.sleep(0.5)

    async def post() -> int:
        async with httpx.AsyncClient() as client:
            headers = {"Content-Type": "application/json"}
            return (await client.post(f"{running.url}/v1/completions", content=stuck(), headers=headers)).status_code

    assert asyncio.run(post()) == 408


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {"Host": "evil.example"}, 403),
        ("GET", {"Host": "evil.example:80"}, 403),
        ("GET", {"Host": "127.0.0.1.evil.example"}, 403),
        ("GET", {"Host": "localhost.evil.example"}, 403),
        ("GET", {"Host": "localhost:1234"}, 200),
        ("GET", {"Host": "LOCALHOST."}, 200),
        ("GET", {"Host": "[::1]:80"}, 200),
        ("GET", {"Host": "127.0.0.1"}, 200),
        ("GET", {"Host": "chat.example:443"}, 200),
        ("GET", {"Host": "a.chat.example"}, 403),
        ("GET", {"Origin": "http://evil.example"}, 403),
        ("GET", {"Origin": "null"}, 403),
        ("GET", {"Origin": "http://localhost:3000"}, 200),
        ("GET", {"Origin": "http://localhost:3000.evil.example"}, 403),
        ("POST", {"Content-Type": "text/plain"}, 415),
        ("POST", {"Content-Type": ""}, 415),
        ("POST", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", {"Content-Type": "text/plain; application/json"}, 415),
        ("POST", {"Content-Type": "Application/JSON; charset=utf-8"}, 200),
        ("POST", {"Content-Type": "application/json", "Origin": "https://evil.example"}, 403),
        ("POST", {"Content-Type": "application/json", "Origin": "http://localhost:3000"}, 200),
    ],
)
def test_web_pages_are_kept_out(running, method, headers, status):
    where, body = ("/v1/completions", '{"prompt": "a", "max_tokens": 1}') if method == "POST" else ("/v1/models", None)
    answer = httpx.request(method, running.url + where, headers=headers, content=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert answer.json()["error"]["message"]
    if "Origin" in headers and status == 200:
        assert answer.headers["access-control-allow-origin"] == headers["Origin"]


def test_a_browser_may_ask_for_an_allowed_page_and_for_no_other(running):
    for origin, allowed in (("http://localhost:3000", True), ("http://evil.example", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        answer = httpx.options(f"{running.url}/v1/completions", headers=asked)
        assert (answer.status_code == 200 and answer.headers.get("access-control-allow-origin") == origin) is allowed


def test_a_server_for_other_machines_answers_to_any_name():
    with RunningServer(host="0.0.0.0") as running:
        assert httpx.get(f"{running.url}/health", headers={"Host": "gpu.example"}).status_code == 200
        assert httpx.get(f"{running.url}/health", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "name", "local"),
    [
        ("[::1]", "::1", True),
        ("[::1]:80", "::1", True),
        ("[::1]evil.example", "[::1]evil.example", False),
        ("a.localhost:1", "a.localhost", True),
        ("", "", False),
    ],
)
def test_host_names(host, name, local):
    assert host_name(host) == name
    assert is_local(name) is local


def test_a_stopping_server_ends_every_stream_with_an_event():
    with RunningServer(grace_s=0.2, limits=LIMITS) as running:

        async def stream(client: httpx.AsyncClient, number: int) -> str:
            body = {
                "prompt": [5 + number],
                "max_tokens": 120,
                "ignore_eos": True,
                "stream": number % 4 > 0,
                "n": 1 + number % 2,
            }
            async with client.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer:
                return "".join([text async for text in answer.aiter_text()])

        async def storm() -> list[str]:
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100)) as client:
                asked = [asyncio.ensure_future(stream(client, number)) for number in range(60)]
                while running.server.engine.stats["tokens"] < 50:
                    await asyncio.sleep(0.01)
                running.server.runner.should_exit = True
                return await asyncio.gather(*asked)

        texts = asyncio.run(storm())
    streams = [text for number, text in enumerate(texts) if number % 4]
    assert all(text.endswith("data: [DONE]\n\n") for text in streams)
    assert all('"finish_reason":"' in text or "shutting down" in text for text in streams)
    assert any("shutting down" in text for text in streams)
    whole = [json.loads(text) for number, text in enumerate(texts) if number % 4 == 0]
    assert all("choices" in one or "shutting down" in one["error"]["message"] for one in whole)


SERVER = """
import sys, time
from quantkit.cli.serve import _introduce
from quantkit.serve.run import open_server, run_server
from quantkit.engine.request import Limits
from tests.tiny import tiny_llama, tiny_tokenizer
grace_s, step_s = map(float, sys.argv[1:])
server = open_server(tiny_llama(), tiny_tokenizer(), port=0, grace_s=grace_s, limits=Limits(running=4, kv_tokens=1024))
step = server.engine.step
server.engine.step = lambda: time.sleep(step_s) or step()
try:
    run_server(server, lambda: _introduce(server, "tiny", "tiny", "127.0.0.1", guarded=False))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("signals", "grace_s", "code"),
    [
        ([signal.SIGTERM], 0.2, -signal.SIGTERM),
        ([signal.SIGINT] * 2, 60, 130),
        ([signal.SIGTERM, signal.SIGINT], 60, -signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_process_without_tracebacks(signals, grace_s, code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, str(grace_s), "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    url = re.search(r"http://\S+", process.stdout.readline())[0]  # it answers as soon as the address is known
    body = {"prompt": [5], "max_tokens": 120, "ignore_eos": True, "stream": True}
    texts, waiting = [], list(signals)
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as answer:
        for number, line in enumerate(answer.iter_lines()):
            texts.append(line)
            if waiting and number % 8 == 0:  # a few tokens apart, so that each one arrives
                process.send_signal(waiting.pop(0))
    _, errors = process.communicate(timeout=30)
    assert not waiting
    assert "shutting down" in "".join(texts)
    assert "".join(texts).endswith("data: [DONE]")
    assert errors == ""
    assert process.returncode == code


def test_long_answers_are_written_beside_the_event_loop(running, monkeypatch):
    """Log probabilities make megabytes of a short request."""
    loop = running.thread.name
    threads = {"whole": set(), "part": set()}
    for name in threads:
        plain = getattr(Reply, name)

        def noted(self, *arguments, name=name, plain=plain):
            threads[name].add((threading.current_thread().name, name == "whole" or arguments[2] is not None))
            return plain(self, *arguments)

        monkeypatch.setattr(Reply, name, noted)
    body = {"prompt": ["the cat"] * 4, "max_tokens": 3, "logprobs": 5, "echo": True, "n": 2, "temperature": 0}
    whole = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
    assert len(whole["choices"]) == 8
    streamed = httpx.post(f"{running.url}/v1/completions", json={**body, "stream": True}, timeout=60).text
    parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = ["".join(part["choices"][0]["text"] for part in parts if part["choices"][0]["index"] == one) for one in range(8)]
    assert text == [choice["text"] for choice in whole["choices"]]
    assert (loop, True) not in threads["whole"] | threads["part"]
    assert threads["whole"]
    assert {first for _, first in threads["part"]} == {True, False}


def test_written_is_json():
    value = {"a": [1, 2.5, None, True, "\ud7ff😀\n"], "b": {}, "c": []}
    assert json.loads(written(value)) == value
    assert written({"a": [1, "é"]}) == '{"a":[1,"é"]}'
