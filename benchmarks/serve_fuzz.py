"""Send a server malformed and hostile requests, and see that it refuses them, stays up, and answers others meanwhile.

    python benchmarks/serve_fuzz.py --model demo --bodies 1100

Bodies are valid requests with fields dropped, added, or replaced by values of other types; texts cut, or made of random
bytes; and requests of 600 KB that cost as much as a request may: prompts, stop strings, tools, schemas. Every 20 ms
``/health`` is asked, and so is a process that does nothing else than answer: what it takes is the machine's part, not the
server's. Exits with 1 after an answer of 500 or more, or if the slowest answer of ``/health`` took 100 ms or more.
"""

import argparse
import asyncio
import collections
import copy
import json
import math
import random
import re
import subprocess
import sys
import time
from typing import Any

import httpx

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
VALID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("completions", {"prompt": "a", "max_tokens": 2, "temperature": 0.5, "logprobs": 1, "echo": True, "stop": ["b"]}),
    ("completions", {"prompt": [[5, 6], [7]], "max_tokens": 2, "n": 2, "logit_bias": {"5": 3}, "stream": True}),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
    ),
    (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        },
    ),
    (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}],
            "max_tokens": 2,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
            "tool_choice": "required",
        },
    ),
)
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        2**63,
        2**70,
        -(2**70),
        "",
        "a",
        "\x00",
        "\ud7ff",
        "😀",
        [],
        {},
        [[]],
        [None],
        {"": None},
    ),
    *(
        {"type": "json_schema"},
        {"$ref": "#"},
        {"type": ["string", "null"]},
        ["a"] * 100,
        {"a": {"a": {"a": {}}}},
        "re:((a*)*)*",
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, one in items for found in ((*path, key), *places(one, (*path, key)))]


def spoiled(rng: random.Random) -> tuple[str, bytes]:
    """Return a route and a body with something wrong in it, mostly."""
    route, body = copy.deepcopy(rng.choice(VALID))
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice(places(body) or [("prompt",)])
        parent: Any = body
        for key in where[:-1]:
            parent = parent[key]
        if rng.random() < 0.2:
            del parent[where[-1]]
        elif rng.random() < 0.1 and isinstance(parent, dict):
            parent[rng.choice(("never_heard_of", "", "seed", "tools", "\x00"))] = copy.deepcopy(rng.choice(ODD))
        else:
            parent[where[-1]] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(body).encode()
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text))]
    if rng.random() < 0.05:
        text = rng.randbytes(rng.randrange(200))
    return route, text


def hostile() -> list[tuple[str, dict[str, Any]]]:
    """Return requests of up to 600 KB that are as much work as a request may be."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(80):
        deep = {"type": "object", "properties": {"a": deep, "b": {"type": "string"}}}
    schemas: list[Any] = [
        deep,
        {"type": "integer", "multipleOf": 99999989},
        {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(100)]},
        {"type": "string", "pattern": "(?:(?:[a-z]{1,100}){1,100}){1,100}"},
        {"type": "string", "pattern": "(" * 20000},
        {"enum": [f"{i}" * 4 for i in range(30000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(1000)}},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    ]
    asked: list[tuple[str, dict[str, Any]]] = [
        (
            "completions",
            {"prompt": "a", "max_tokens": 4, "response_format": {"type": "json_schema", "json_schema": {"schema": one}}},
        )
        for one in schemas
    ]
    function = {"type": "function", "function": {"name": "f", "description": "x" * 1000}}
    tools = [{**function, "function": {**function["function"], "name": f"f{i}"}} for i in range(500)]  # type: ignore[dict-item]
    return [
        *asked,
        ("completions", {"prompt": ["a"] * 150000, "n": 16}),
        ("completions", {"prompt": "the cat " * 75000}),
        ("completions", {"prompt": "a", "stop": ["a" * 600000]}),
        ("completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(50000)}}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * 20000}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": tools}),
    ]


IDLE = """
import asyncio

async def answer(reader, writer):
    try:
        while await reader.readuntil(b"\\r\\n\\r\\n"):
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()

async def main():
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
"""A server that has nothing to do."""


async def watch(client: httpx.AsyncClient, found: list[float]) -> None:
    """Ask for /health every 20 ms, and note how long it takes in milliseconds."""
    while True:
        begun = time.perf_counter()
        try:
            (await client.get("/health")).raise_for_status()
        except httpx.TransportError:
            found.append(math.inf)
            return
        found.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.02)


async def attack(
    url: str, idle: str, bodies: int, seed: int
) -> tuple[collections.Counter[int], dict[str, list[float]], list[str]]:
    rng, statuses, wrong = random.Random(seed), collections.Counter[int](), list[str]()
    health: dict[str, list[float]] = {f"{asked} beside {name} requests": [] for name in ("no", "malformed", "hostile")
                                      for asked in ("/health", "nothing else")}  # fmt: skip
    headers, limits = {"content-type": "application/json"}, httpx.Limits(max_connections=40)

    async def send(client: httpx.AsyncClient, route: str, body: bytes) -> None:
        async with gate:
            try:
                answer = await client.post(f"/v1/{route}", content=body, headers=headers)
            except httpx.TimeoutException:
                wrong.append(f"no answer in 5 minutes to {body[:200]!r}")
                return
            except httpx.TransportError as error:  # it has fallen over, or hung up
                wrong.append(f"{type(error).__name__} instead of an answer to {body[:2000]!r}")
                return
        statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            wrong.append(f"{answer.status_code} {answer.text[:200]} for {body[:200]!r}")

    gate = asyncio.Semaphore(8)
    async with (
        httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client,
        httpx.AsyncClient(base_url=url, timeout=60) as other,
        httpx.AsyncClient(base_url=idle, timeout=60) as bare,
    ):
        for name, sent in (
            ("no", []),
            ("malformed", [spoiled(rng) for _ in range(bodies)]),
            ("hostile", [(route, json.dumps(body).encode()) for route, body in hostile()]),
        ):
            pairs = ((other, "/health"), (bare, "nothing else"))
            watching = [asyncio.ensure_future(watch(one, health[f"{asked} beside {name} requests"])) for one, asked in pairs]
            await asyncio.gather(*(send(client, *one) for one in sent), asyncio.sleep(0 if sent else 5))
            for one in watching:
                one.cancel()
    return statuses, health, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bodies", type=int, default=1100)
    parser.add_argument("--context", type=int, default=96, help="of the server: what a request that sets no limit may cost")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "quantkit", "serve", arguments.model, "--port", "0", "--context", str(arguments.context)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    idle = subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert idle.stdout is not None
        bare = idle.stdout.readline().strip()
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://[\d.]+:\d+", line)))
        statuses, health, wrong = asyncio.run(attack(url, bare, arguments.bodies, arguments.seed))
    finally:
        idle.terminate()
        server.terminate()
        code = server.wait(30)
    print("the server ended with", code)
    print("statuses:", dict(sorted(statuses.items())))
    for name, taken in health.items():
        ordered = sorted(taken)
        middle, late = (ordered[len(ordered) * share // 100] if ordered else 0.0 for share in (50, 99))
        shown = f"median {middle:.1f} ms, 99 % {late:.1f} ms, slowest {ordered[-1]:.1f} ms" if ordered else "was not asked"
        print(f"{name}: {len(ordered)} answers, {shown}")
    for line in wrong:
        print(line)
    ours = [taken for name, taken in health.items() if name.startswith("/health")]
    if wrong or not all(ours) or max(map(max, ours)) >= 100:
        sys.exit(1)


if __name__ == "__main__":
    main()
