"""Crowd a server of a real model: many clients at once, half of whom hang up mid-answer, among malformed and endless requests.

    python benchmarks/serve_stress.py --model demo --rounds 3

Starts ``quantkit serve`` on a free local port, and after every round waits for it to fall idle and reads what it holds: pages,
requests running and waiting (all must be back at zero), and its resident memory, which must not grow from round to round (the
first one fills buffers that stay). At last all clients ask for long streams, and the server is told to stop (SIGTERM) in the
middle: every stream must end whole or with an event that says why. Exits with 1 if anything is left, an answer was cut, or a
bad request got through.
"""

import argparse
import asyncio
import collections
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from quantkit.system.files import write_json

GROWTH_MIB = 32
"""Of resident memory from the second round to the last: what an allocator may move without anything having leaked."""
BAD: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe\x00", 400),
    (b"[1, 2, 3]", 400),
    (b'{"prompt": 5}', 400),
    (b'{"prompt": "a", "tools": []}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400),
    (b'{"prompt": "a", "model": "another"}', 404),
    (json.dumps({"prompt": [5] * 60000}).encode(), 400),  # longer than the context
    (b'{"prompt": "' + b"a" * (2 << 20) + b'"}', 413),  # longer than a body may be
    (b"[" * 100000, 400),
)


async def answer(client: httpx.AsyncClient, number: int, tokens: int) -> str:
    """Ask for one answer; clients of even number hang up in the middle of it."""
    leaves, streams = number % 2 == 0, number % 4 < 3
    body: dict[str, Any] = {"prompt": f"Client {number % 7} asks about number {number}:", "max_tokens": tokens}
    body |= {"temperature": 0.8, "seed": number, "ignore_eos": True, "stream": streams}
    if not streams:
        reply = await client.post("/v1/completions", json=body)
        return "whole" if reply.status_code == 200 else f"status {reply.status_code}"
    text, lines = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            text, lines = text + line, lines + 1
            if leaves and lines >= 4 + number % 9:
                return "left"
    return "whole" if text.endswith("[DONE]") else "cut"


async def nonsense(client: httpx.AsyncClient, number: int) -> str:
    content, status = BAD[number % len(BAD)]
    reply = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    return "refused" if reply.status_code == status else f"{content[:40]!r} got {reply.status_code}, want {status}"


async def storm(url: str, clients: int, tokens: int) -> collections.Counter[str]:
    limits = httpx.Limits(max_connections=clients + 64)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        jobs = [answer(client, i, tokens) for i in range(clients)] + [nonsense(client, i) for i in range(clients // 4)]
        return collections.Counter(await asyncio.gather(*jobs))


async def farewell(url: str, server: "subprocess.Popen[str]", clients: int) -> collections.Counter[str]:
    """Open a long stream for every client, stop the server in the middle, and say how the streams end."""
    begun = 0

    async def listen(client: httpx.AsyncClient, number: int) -> str:
        nonlocal begun
        body = {"prompt": f"Client {number} asks:", "max_tokens": 2000, "ignore_eos": True, "stream": True, "seed": number}
        last, failed = "", False
        try:
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                begun += 1  # the head of the answer is there, whether its turn has come or not
                async for line in reply.aiter_lines():
                    last, failed = line or last, failed or line.startswith('data: {"error"')
        except httpx.TransportError as error:
            return f"cut: {type(error).__name__}"
        done = last == "data: [DONE]"
        return "ended with an event" if failed else "whole" if done else f"cut after {last[:60]!r}"

    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=clients), timeout=600) as client:
        jobs = [asyncio.ensure_future(listen(client, number)) for number in range(clients)]
        until = time.monotonic() + 120
        while begun < clients and time.monotonic() < until:
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        server.terminate()
        return collections.Counter(await asyncio.gather(*jobs))


def held(url: str, pid: int) -> dict[str, float]:
    """Wait until nothing runs, and return what the server holds."""
    until = time.monotonic() + 60
    while True:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        found = {name: float(value) for name, value in re.findall(r"^quantkit_(\w+) ([\d.]+)$", text, re.MULTILINE)}
        kept = {name: found[name] for name in ("running", "waiting", "pages_used", "pages_cached")}
        if not (kept["running"] or kept["waiting"] or kept["pages_used"]) or time.monotonic() > until:
            break
        time.sleep(0.2)
    status = Path(f"/proc/{pid}/status").read_text()
    kept["resident_mib"] = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
    kept["threads"] = int(re.findall(r"Threads:\s+(\d+)", status)[0])
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", nargs="*", default=[], help="for quantkit serve, without the leading dashes: running=8")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    options = [part for option in arguments.options for part in (f"--{option}").split("=", 1)]
    command = [sys.executable, "-m", "quantkit", "serve", arguments.model, "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://[\d.]+:\d+", line)))
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        rounds: list[dict[str, Any]] = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            results = asyncio.run(storm(url, arguments.clients, arguments.tokens))
            rounds.append({"seconds": time.perf_counter() - start, "results": dict(results), **held(url, server.pid)})
            print(rounds[-1], flush=True)
            if arguments.json:
                write_json(arguments.json, {"clients": arguments.clients, "tokens": arguments.tokens, "rounds": rounds})
        ended = asyncio.run(farewell(url, server, arguments.clients))
        print("told to stop with", arguments.clients, "open streams:", dict(ended), flush=True)
    finally:
        server.terminate()
        code = server.wait(30)
    left = [one for one in rounds if one["running"] or one["waiting"] or one["pages_used"]]
    wrong = {result for one in rounds for result in one["results"]} - {"whole", "left", "refused"}
    wrong |= ended.keys() - {"whole", "ended with an event"}
    growth = rounds[-1]["resident_mib"] - rounds[min(1, len(rounds) - 1)]["resident_mib"]
    print(f"memory grew by {growth:.1f} MiB after the second round; the server ended with {code}")
    if left or wrong or growth > GROWTH_MIB or code not in (0, -15, 130):
        sys.exit(f"left behind: {left}; wrong: {wrong}")


if __name__ == "__main__":
    main()
