"""The routes of the server: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import QueueFull
from quantkit.errors import QuantkitError
from quantkit.generation.text import encode_prompt
from quantkit.serve.metrics import counter, gauge
from quantkit.serve.wire import Chat, Completion, Generating, Reply, explain, usage
from quantkit.serve.worker import Answer, Piece, Worker

Kind = Literal["chat", "text"]
SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        model: name of the model for clients.
        end_tokens: token ids that end an answer, unless a request ignores them.
        token: bearer token that clients must send; None for none.
        default_tokens: longest answer if a request does not set one, limited by the context.
        body_bytes: largest request body.
    """

    model: str
    end_tokens: frozenset[int] = frozenset()
    token: str | None = None
    default_tokens: int = 512
    body_bytes: int = 1 << 20


class _Refused(Exception):
    """An error that is reported to the client."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None) -> None:
        super().__init__(message)
        self.response = JSONResponse(
            {"error": {"message": message, "type": kind, "param": param, "code": None}},
            status,
            {"WWW-Authenticate": "Bearer"} if status == 401 else None,
        )


def make_app(engine: TokenEngine, tokenizer: Any, settings: ServerSettings) -> Starlette:
    """Return the ASGI application. It starts the engine's thread now and stops it at the end of its lifespan.

    Args:
        engine: the engine; only the application may use it from now on.
        tokenizer: the model's tokenizer.
        settings: settings of the server.
    """
    server = _Server(Worker(engine, tokenizer), settings)
    routes = [
        Route("/v1/completions", server.guard(server.complete), methods=["POST"]),
        Route("/v1/chat/completions", server.guard(server.chat), methods=["POST"]),
        Route("/v1/models", server.guard(server.models)),
        Route("/metrics", server.guard(server.metrics)),
        Route("/health", server.health),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.worker.close)

    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.worker = server.worker
    return app


class _Server:
    """The handlers of the routes."""

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self.worker, self.settings = worker, settings

    def guard(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that checks the token, calls ``route`` and converts its errors to responses."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_token(request)
                return await route(request)
            except _Refused as refused:
                return refused.response
            except QueueFull as error:
                return _Refused(429, str(error), "rate_limit_error").response
            except QuantkitError as error:
                return _Refused(400, str(error)).response
            except ClientDisconnect:
                return Response(status_code=499)

        return guarded

    def _check_token(self, request: Request) -> None:
        if self.settings.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise _Refused(
                401, "this server needs a token: send the header Authorization: Bearer TOKEN", "authentication_error"
            )

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = await self._read(request, Completion)
        tokenizer = self.worker.tokenizer
        prompts = [one if isinstance(one, list) else encode_prompt(one, tokenizer).tolist() for one in asked.prompts]
        return await self._answer(request, asked, prompts, asked.max_tokens, "text")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = await self._read(request, Chat)
        prompt = encode_prompt([message.plain() for message in asked.messages], self.worker.tokenizer).tolist()
        return await self._answer(request, asked, [prompt], asked.max_completion_tokens or asked.max_tokens, "chat")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        one = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "quantkit"}
        return JSONResponse({"object": "list", "data": [{**one, "max_model_len": self.worker.engine.limits.context_tokens}]})

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine's thread runs."""
        return JSONResponse({"status": "ok"}) if self.worker.alive else JSONResponse({"status": "the engine has stopped"}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return PlainTextResponse("\n".join(metric_lines(self.worker)) + "\n", media_type="text/plain; version=0.0.4")

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        """Return the validated body of a request.

        Raises:
            _Refused: the body is too large or invalid, or names another model.
        """
        limit, body = self.settings.body_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _Refused(413, f"the body has more than {limit} bytes, which is the limit of this server")
        try:
            asked: Generating = kind.model_validate(json.loads(body))
        except ValidationError as error:
            param, message = explain(error, kind)
            raise _Refused(400, message, param=param) from error
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
            raise _Refused(400, f"the body is not JSON: {error}") from error
        if asked.model not in (None, "", self.settings.model):
            raise _Refused(404, f"model {asked.model!r} does not exist; this server has {self.settings.model!r}", param="model")
        return asked

    async def _answer(
        self, request: Request, asked: Generating, prompts: list[list[int]], max_tokens: int | None, kind: Kind
    ) -> Response:
        """Submit the prompts and return the response, complete or streamed."""
        options = [self._options(asked, ids, max_tokens, choice) for ids in prompts for choice in range(asked.n)]
        ids = [ids for ids in prompts for _ in range(asked.n)]
        answers = await self.worker.submit(ids, asked.stops, options)
        reply = Reply(kind, self.settings.model, self.worker.tokenizer)
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = self._stream(answers, reply, with_usage, prompts)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices = await self._collect(request, answers)
        for pieces in choices:
            if pieces[-1].error is not None or pieces[-1].finish == "cancelled":
                raise _Refused(500, pieces[-1].error or SHUTTING_DOWN, "server_error")
        return JSONResponse(reply.whole(choices, _used(prompts, answers)))

    def _options(self, asked: Generating, ids: list[int], max_tokens: int | None, choice: int) -> dict[str, Any]:
        """Return the arguments of the engine's ``submit`` for one choice."""
        context = self.worker.engine.limits.context_tokens
        assert context is not None
        room = max(
            min(self.settings.default_tokens, context - len(ids)), 1
        )  # with 1, the engine refuses the request and says why
        ends = frozenset() if asked.ignore_eos else self.settings.end_tokens
        return {
            "max_new_tokens": max_tokens or room,
            "min_new_tokens": asked.min_tokens,
            "sampling": asked.sampling(choice),
            "stop_tokens": ends,
            "logprobs": asked.num_logprobs,
        }

    async def _collect(self, request: Request, answers: list[Answer]) -> list[list[Piece]]:
        """Wait for complete answers; cancel them if the client disconnects."""

        async def one(answer: Answer) -> list[Piece]:
            return [piece async for piece in answer.pieces()]

        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                continue

        done = asyncio.ensure_future(asyncio.gather(*(one(answer) for answer in answers)))
        gone: asyncio.Future[None] = asyncio.ensure_future(disconnected())
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientDisconnect
            return await done
        finally:
            for task in (done, gone):
                task.cancel()
            self.worker.cancel(answers)

    async def _stream(
        self, answers: list[Answer], reply: Reply, with_usage: bool, prompts: list[list[int]]
    ) -> AsyncIterator[str]:
        """Yield server-sent events; cancel the answers if the client disconnects."""
        merged: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        async def forward(index: int, answer: Answer) -> None:
            async for piece in answer.pieces():
                merged.put_nowait((index, piece))

        tasks = [asyncio.ensure_future(forward(index, answer)) for index, answer in enumerate(answers)]
        begun: set[int] = set()
        unfinished = len(answers)
        try:
            while unfinished:
                index, piece = await merged.get()
                unfinished -= piece.finish is not None
                if piece.finish in ("error", "cancelled"):
                    message = piece.error or SHUTTING_DOWN
                    yield _event({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
                elif piece.text or piece.finish or piece.logprob or index not in begun:
                    yield _event(reply.part(index, piece, index not in begun))
                begun.add(index)
            if with_usage:
                yield _event(reply.last(_used(prompts, answers)))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self.worker.cancel(answers)


def metric_lines(worker: Worker) -> list[str]:
    """Return the metrics as lines of Prometheus' text format."""
    engine = worker.engine
    pages, stats = engine.scheduler.pages, engine.stats
    finished = {reason: float(stats[reason]) for reason in ("stop", "length", "cancelled", "error")}
    found = [
        counter("quantkit_requests_total", "Accepted requests.", stats["requests"]),
        counter("quantkit_finished_total", "Finished requests by reason.", finished, "reason"),
        counter("quantkit_prompt_tokens_total", "Tokens of accepted prompts.", worker.prompt_tokens),
        counter("quantkit_cached_tokens_total", "Prompt tokens found in cached pages.", pages.hit_tokens),
        counter("quantkit_tokens_total", "Generated tokens.", stats["tokens"]),
        counter("quantkit_draft_tokens_total", "Verified draft tokens.", stats["drafted"]),
        counter("quantkit_accepted_tokens_total", "Draft tokens accepted.", stats["accepted"]),
        counter("quantkit_steps_total", "Steps of the model.", stats["steps"]),
        counter("quantkit_step_seconds_total", "Time spent in steps.", stats["busy_us"] / 1e6),
        counter("quantkit_step_failures_total", "Steps that raised an exception.", worker.failures),
        counter("quantkit_preemptions_total", "Preemptions of running requests.", engine.scheduler.preemptions),
        gauge("quantkit_running", "Running requests.", len(engine.scheduler.running)),
        gauge("quantkit_waiting", "Waiting requests.", len(engine.scheduler.waiting)),
        gauge("quantkit_pages", "Pages of the key/value memory.", pages.count),
        gauge("quantkit_pages_used", "Pages in use.", pages.used),
        gauge("quantkit_pages_cached", "Pages kept for later requests.", pages.cached),
        gauge("quantkit_kv_bytes", "Bytes of the key/value memory.", engine.backend.bytes_for(engine.memory)),
        worker.first_token_s.lines("quantkit_first_token_seconds", "Time from arrival to the first token."),
        worker.token_s.lines("quantkit_token_seconds", "Time between tokens."),
    ]
    return [line for lines in found for line in lines]


def _used(prompts: list[list[int]], answers: list[Answer]) -> dict[str, Any]:
    tokens = sum(answer.request.answered for answer in answers)
    cached = sum(answer.request.sequence.cached_tokens for answer in answers[:: max(len(answers) // len(prompts), 1)])
    return usage(sum(len(ids) for ids in prompts), cached, tokens)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
