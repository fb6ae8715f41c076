"""Clients that leave, that never read and that never ask: others are served meanwhile, and nothing of theirs is kept."""

import json
import logging
import socket
import struct
import time

import httpx
import pytest

from quantkit.engine.request import Limits
from tests.serve.test_server import RunningServer

LONG = {"prompt": [5], "max_tokens": 100, "ignore_eos": True}


@pytest.fixture
def impatient(monkeypatch):
    """A server that waits for no client longer than a moment."""
    monkeypatch.setattr("quantkit.serve.listener.WATCH_S", 0.02)
    monkeypatch.setattr("quantkit.serve.listener.UNREAD_S", 0.3)
    monkeypatch.setattr("quantkit.serve.listener.UNASKED_S", 0.3)
    with RunningServer(limits=Limits(running=8, kv_tokens=1024, waiting=300)) as server:
        yield server


def connect(running, sent: bytes, buffer: int | None = None) -> socket.socket:
    """Return a connection on which something has been sent; ``buffer`` bytes of what comes back fit the client's side."""
    one = socket.socket()
    if buffer is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    one.settimeout(20)
    one.connect(("127.0.0.1", running.server.port))
    one.sendall(sent)
    return one


def request(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return f"{head}\r\n\r\n".encode() + content


def was_cut(one: socket.socket) -> bool:
    """Read to the end; return whether the server ended the connection before the end of its answer."""
    got = b""
    try:
        while piece := one.recv(1 << 16):
            got += piece
    except ConnectionResetError:
        return True
    return not got.endswith(b"0\r\n\r\n")


def until(condition) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def test_a_client_that_never_reads_is_cut_off(impatient):
    impatient.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted connections inherit it
    unread = connect(impatient, request({**LONG, "stream": True, "n": 16, "logprobs": 20}), buffer=2048)
    until(lambda: impatient.server.engine.busy)
    until(lambda: not impatient.server.runner.server_state.connections)
    impatient.settle()
    assert was_cut(unread)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: y", request(LONG)[:90]])
def test_a_client_that_never_asks_is_cut_off(impatient, sent):
    silent = connect(impatient, sent)
    until(lambda: impatient.server.runner.server_state.connections)
    assert was_cut(silent)


def test_clients_that_do_something_are_not_cut_off(impatient):
    def slow():
        for byte in json.dumps({**LONG, "max_tokens": 2}).encode():
            yield bytes([byte])
            time.sleep(0.01)

    with httpx.Client(base_url=impatient.url, timeout=20) as client:
        end = time.monotonic() + 1
        while time.monotonic() < end:  # each question is answered long before the server looks again
            assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", content=slow(), headers={"Content-Type": "application/json"}).status_code == 200
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True, "n": 16}) as answer:
            texts = []
            for line in answer.iter_lines():
                texts.append(line)
                if len(texts) < 6:
                    time.sleep(0.1)
    assert texts[-2] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_is_not_in_the_log(caplog, stream, reset):
    with RunningServer() as running, caplog.at_level(logging.WARNING):
        for _ in range(4):
            one = connect(running, request({**LONG, "stream": stream, "n": 4, "logprobs": 5}))
            until(lambda: running.server.engine.busy)
            if reset:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
            running.settle()
        assert running.server.engine.stats["cancelled"] > 0
    assert [record.getMessage() for record in caplog.records] == []


def test_a_client_gives_up_an_idle_connection_before_the_server_does():
    theirs = httpx.Limits().keepalive_expiry
    assert theirs is not None
    with RunningServer() as running:
        assert running.server.runner.config.timeout_keep_alive > 2 * theirs
