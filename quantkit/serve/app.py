"""The routes of the server: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import QueueFull
from quantkit.errors import QuantkitError
from quantkit.serve.describe import describe
from quantkit.serve.guard import Guard
from quantkit.serve.intake import Accepted, Intake, Refused
from quantkit.serve.journal import Journal, note
from quantkit.serve.metrics import Metrics
from quantkit.serve.reply import Kind, Reply, failure, usage, written
from quantkit.serve.wire import Chat, Completion, Generating
from quantkit.serve.worker import Answer, Closed, Piece, Worker

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "the server is shutting down"
ABSENT = {
    "embeddings": "embeddings need a model that was trained for them",
    "responses": "use /v1/chat/completions",
    "moderations": "this server judges no text",
    "rerank": "ranking needs a model that was trained for it",
    "images/generations": "this server makes no pictures",
    "audio/speech": "this server makes no sound",
    "audio/transcriptions": "this server hears no sound",
    "audio/translations": "this server hears no sound",
    "files": "this server keeps no files",
    "batches": "send the requests at once; they run side by side",
    "fine_tuning/jobs": "quantkit train does that",
}
"""Parts of OpenAI's API that this server does not have, and what to do instead."""
UNCACHED = {"Cache-Control": "no-cache"}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        model: name of the model for clients.
        end_tokens: token ids that end an answer, unless a request ignores them.
        token: bearer token that clients must send; None for none.
        loopback: only this machine can reach the server; see :mod:`quantkit.serve.guard`.
        hosts: names under which such a server may be asked besides those of this machine.
        origins: origins of web pages that may use the server; ``"*"`` for all.
        default_tokens: longest answer if a request does not set one, limited by the context.
        body_bytes: largest request body.
        answers: most answers to one request, over all its prompts; never more than may wait.
    """

    model: str
    end_tokens: frozenset[int] = frozenset()
    token: str | None = None
    loopback: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    default_tokens: int = 512
    body_bytes: int = 1 << 20
    answers: int = 256


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
        Route("/v1/models/{name:path}", server.guard(server.model)),
        Route("/metrics", server.guard(server.metrics)),
        Route("/health", server.health),
        Route("/openapi.json", server.guard(server.description)),
        *(Route(f"/v1/{name}", server.guard(server.absent), methods=["GET", "POST"]) for name in ABSENT),
    ]
    guards = [
        Middleware(Journal),
        Middleware(Guard, loopback=settings.loopback, hosts=settings.hosts, origins=settings.origins),
    ]
    if settings.origins:
        headers = ("Authorization", "Content-Type")
        pages = Middleware(CORSMiddleware, allow_origins=settings.origins, allow_methods=("GET", "POST"), allow_headers=headers)
        guards.insert(1, pages)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        server.intake.close()
        await asyncio.to_thread(server.worker.close)

    app = Starlette(routes=routes, middleware=guards, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    app.state.worker, app.state.intake = server.worker, server.intake
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a request that no route takes."""
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path[:200]}: {error.detail}; this server has /v1/completions, /v1/chat/completions,"
    )
    return JSONResponse(failure(f"{message} /v1/models, /health and /metrics"), error.status_code, error.headers)


def _refuse(status: int, message: str, kind: str, param: str | None = None) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}.get(status)
    return JSONResponse(failure(message, kind, param), status, headers)


class _Server:
    """The handlers of the routes."""

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self.worker, self.settings = worker, settings
        limits = worker.engine.limits
        assert limits.context_tokens is not None
        self._context = limits.context_tokens
        answers = min(settings.answers, limits.waiting)
        self.intake = Intake(worker.tokenizer, sorted(settings.end_tokens), self._context, settings.body_bytes, answers)
        self._metrics = Metrics(worker)

    def guard(self, route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that checks the token, calls ``route`` and converts its errors to responses."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_token(request)
                return await route(request)
            except Refused as refused:
                return _refuse(refused.status, str(refused), refused.kind, refused.param)
            except QueueFull as error:
                return _refuse(429, str(error), "rate_limit_error")
            except Closed as error:
                return _refuse(503, str(error), "server_error")
            except QuantkitError as error:
                return _refuse(400, str(error), "invalid_request_error")
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:  # a fault of the server; the client hears of it in the form it expects
                logger.exception("%s %s failed", request.method, request.url.path)
                return _refuse(500, f"the server failed: {type(error).__name__}: {error}"[:500], "server_error")

        return guarded

    def _check_token(self, request: Request) -> None:
        if self.settings.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise Refused(401, "this server needs a token: send the header Authorization: Bearer TOKEN", "authentication_error")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        accepted = await self.intake.read(request, Completion)
        return await self._answer(request, accepted, accepted.asked.max_tokens, "text")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        accepted = await self.intake.read(request, Chat)
        return await self._answer(request, accepted, accepted.asked.max_completion_tokens or accepted.asked.max_tokens, "chat")

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the engine's thread runs."""
        return JSONResponse({"status": "ok"}) if self.worker.alive else JSONResponse({"status": "the engine has stopped"}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        text, kind = self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": kind})

    async def description(self, request: Request) -> Response:
        """GET /openapi.json: the description of this server for programs."""
        return JSONResponse(describe())

    async def absent(self, request: Request) -> Response:
        """Answer a request for a part of OpenAI's API that this server does not have."""
        name = request.url.path.removeprefix("/v1/")
        raise Refused(404, f"this server generates text and has no /v1/{name}: {ABSENT[name]}")

    def _model(self) -> dict[str, Any]:
        one = {"id": self.settings.model, "object": "model", "created": 0, "owned_by": "quantkit"}
        return {**one, "max_model_len": self._context}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.settings.model):
            message = f"model {str(name)[:100]!r} does not exist; this server has {self.settings.model!r}"
            raise Refused(404, message, param="model")

    async def _answer(self, request: Request, accepted: Accepted, max_tokens: int | None, kind: Kind) -> Response:
        """Submit the prompts and return the response, complete or streamed."""
        asked, prompts = accepted.asked, accepted.prompts
        self._check_model(asked.model)
        options = [self._options(asked, ids, max_tokens, choice) for ids in prompts for choice in range(asked.n)]
        for option, form in zip(options, accepted.forms, strict=bool(accepted.forms)):
            option["constraint"] = form
        ids = [ids for ids in prompts for _ in range(asked.n)]
        answers = await self.worker.submit(ids, asked.stop, options)
        note(request, answers)
        reply = Reply(kind, self.settings.model, self.worker.tokenizer, accepted)
        if asked.stream:
            events = self._stream(answers, reply, accepted)
            return StreamingResponse(events, media_type="text/event-stream", headers=UNCACHED)
        choices = await self._collect(request, answers)
        for pieces in choices:
            if pieces[-1].finish == "cancelled":
                raise Refused(503, SHUTTING_DOWN, "server_error")
            if pieces[-1].error is not None:
                raise Refused(500, pieces[-1].error, "server_error")
        # log probabilities make a long answer of a short request: it is written while the event loop serves others
        body = await asyncio.to_thread(lambda: written(reply.whole(answers, choices, _used(accepted, answers))))
        return Response(body, media_type="application/json")

    def _options(self, asked: Generating, ids: list[int], max_tokens: int | None, choice: int) -> dict[str, Any]:
        """Return the arguments of the engine's ``submit`` for one choice."""
        room = min(self.settings.default_tokens, self._context - len(ids))
        ends = frozenset() if asked.ignore_eos else self.settings.end_tokens
        return {
            "max_new_tokens": max(room, 1)
            if max_tokens is None
            else max(max_tokens, 1),  # with 1, the engine refuses the request and says why
            "min_new_tokens": asked.min_tokens,
            "sampling": asked.sampling(choice),
            "stop_tokens": ends,
            "logprobs": asked.num_logprobs,
            "scores_prompt": asked.num_logprobs is not None and getattr(asked, "echo", False),
        }

    async def _collect(self, request: Request, answers: list[Answer]) -> list[list[Piece]]:
        """Wait for complete answers; cancel them if the client disconnects."""

        async def whole() -> list[list[Piece]]:
            return [[piece async for piece in answer.pieces()] for answer in answers]

        async def disconnected() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                continue

        done = asyncio.ensure_future(whole())
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

    async def _stream(self, answers: list[Answer], reply: Reply, accepted: Accepted) -> AsyncIterator[str]:
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
                # a queue that is not empty lets nobody else go on, not even the news that the client left
                await asyncio.sleep(0)
                unfinished -= piece.finish is not None
                if piece.finish in ("error", "cancelled"):
                    message = piece.error or SHUTTING_DOWN
                    yield _event(failure(message, "server_error"))
                elif piece.text or piece.finish or piece.logprob or index not in begun:
                    if index in begun:
                        part = reply.part(index, piece, None)
                    else:  # with echo, it has the prompt and its log probabilities
                        part = await asyncio.to_thread(reply.part, index, piece, answers[index].request)
                    if part is not None:
                        yield _event(part)
                begun.add(index)
            if accepted.asked.stream_options.include_usage:
                yield _event(reply.last(_used(accepted, answers)))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self.worker.cancel(answers)


def _used(accepted: Accepted, answers: list[Answer]) -> dict[str, Any]:
    prompts = accepted.prompts
    tokens = 0 if accepted.asked.max_tokens == 0 else sum(answer.request.answered for answer in answers)
    cached = sum(answer.request.sequence.cached_tokens for answer in answers[:: max(len(answers) // len(prompts), 1)])
    return usage(sum(len(ids) for ids in prompts), cached, tokens)


def _event(data: dict[str, Any]) -> str:
    return f"data: {written(data)}\n\n"
