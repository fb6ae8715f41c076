"""The OpenAPI description of the server (spec.openapis.org/oas/v3.1.0), made from the models that read its requests.

Programs that write clients or test servers read it at ``/openapi.json``.
"""

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

from quantkit.serve.wire import Chat, Completion
from quantkit.version import __version__

REFERENCE = "#/components/schemas/{model}"
TOP_NEEDS_LOGPROBS = {
    "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
    "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
}
"""What OpenAI's reference says of these two fields of a chat."""


@functools.cache
def describe() -> dict[str, Any]:
    """Return the description."""
    _, found = models_json_schema([(Chat, "validation"), (Completion, "validation")], ref_template=REFERENCE)
    schemas = {name: _nullable(schema) for name, schema in found["$defs"].items()}
    schemas["Chat"] |= TOP_NEEDS_LOGPROBS
    return {
        "openapi": "3.1.0",
        "info": {"title": "quantkit", "version": __version__, "description": "One language model, with OpenAI's API."},
        "components": {
            "schemas": {**schemas, **_RESPONSES},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/chat/completions": {"post": _generating("chat", "Answer a conversation.", "Chat")},
            "/v1/completions": {"post": _generating("complete", "Continue text.", "Completion")},
            "/v1/models": {"get": _reading("models", "List the model.", "Models")},
            "/v1/models/{name}": {"get": {**_reading("model", "Describe a model.", "Model"), "parameters": [_NAME]}},
            "/health": {"get": _reading("health", "Say whether the engine runs.", "Health")},
            "/metrics": {"get": _METRICS},
        },
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Let every field that may be absent be null, which means the same."""
    required = schema.get("required", ())
    fields = schema.get("properties", {})
    for name, field in fields.items():
        if name not in required and {"type": "null"} not in field.get("anyOf", ()):
            fields[name] = {"anyOf": [field, {"type": "null"}]}
    return schema


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=name)}}}


def _refusals(*codes: str) -> dict[str, Any]:
    return {code: {"description": "An error that says why.", "content": _content("Failure")} for code in codes}


def _generating(name: str, what: str, body: str) -> dict[str, Any]:
    done = {**_content(f"{body}Answer"), "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "operationId": name,
        "summary": what,
        "requestBody": {"required": True, "content": _content(body)},
        "responses": {
            "200": {"description": "The answer, or a stream of its pieces.", "content": done},
            **_refusals("400", "401", "403", "404", "408", "413", "415", "429", "500", "503"),
        },
    }


def _reading(name: str, what: str, body: str) -> dict[str, Any]:
    found = {"200": {"description": what, "content": _content(body)}, **_refusals("400", "401", "403", "404", "405", "503")}
    return {"operationId": name, "summary": what, "responses": found}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _NUMBER, "owned_by": _TEXT}, max_model_len=_NUMBER)
_USAGE = _object({"prompt_tokens": _NUMBER, "completion_tokens": _NUMBER, "total_tokens": _NUMBER})
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _NULLABLE_TEXT}, tool_calls={"type": "array"})
_FRAME = {"id": _TEXT, "created": _NUMBER, "model": _TEXT, "usage": _USAGE}
_ERROR = _object({"message": _TEXT, "type": _TEXT, "param": _NULLABLE_TEXT, "code": _NULLABLE_TEXT})


def _answer(kind: str, **choice: Any) -> dict[str, Any]:
    one = _object({"index": _NUMBER, "finish_reason": _FINISH, **choice}, logprobs={"type": ["object", "null"]})
    return _object({**_FRAME, "object": {"const": kind}, "choices": {"type": "array", "items": one, "minItems": 1}})


_RESPONSES = {
    "ChatAnswer": _answer("chat.completion", message=_MESSAGE),
    "CompletionAnswer": _answer("text_completion", text=_TEXT),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "Health": _object({"status": _TEXT}),
    "Failure": _object({"error": _ERROR}),
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_METRICS = {
    "operationId": "metrics",
    "summary": "Numbers for Prometheus.",
    "responses": {"200": {"description": "Lines of text.", "content": {"text/plain": {"schema": _TEXT}}}, **_refusals("401")},
}
