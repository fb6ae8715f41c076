"""The formats of requests in OpenAI's API.

Clients send every field they know, whether it is needed or not. So null means that a field is absent, and a field that quantkit
does not support is accepted with the values that ask for nothing (``functions: []``, ``best_of: 1``), and if it only concerns
accounts, storage or caches (``user``, ``store``). Any other value, and a field that nobody knows, is an error that names it: a
client that requests beams or a voice must not get something else.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError, nearest
from quantkit.generation.stops import check_stops
from quantkit.serve.forms import ChosenTool, Fields, ResponseFormat, Tool

MAX_VALUES = 32768
"""Most values in a request, besides its prompt."""

MAX_BIASES = 1024
"""Most tokens with a bias."""

FOR_ACCOUNTS = frozenset(
    (
        *("cache_prompt", "cache_salt", "metadata", "prediction", "priority", "prompt_cache_key"),
        *("prompt_cache_options", "prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "store", "user"),
    )
)
"""Fields that do not change an answer, whatever their value is."""


def _is(value: Any, number: int) -> bool:
    """Return whether a value is this number; true and false are none, though Python says so."""
    return not isinstance(value, bool) and bool(value == number)


_NOTHING: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("functions", "stop_token_ids", "bad_words", "documents"), lambda value: value == []),
    "function_call": lambda value: value in ("none", "auto"),
    **dict.fromkeys(("mirostat", "n_probs", "prompt_logprobs"), lambda v: _is(v, 0)),
    **dict.fromkeys(("length_penalty", "typical_p", "best_of"), lambda value: _is(value, 1)),
    **dict.fromkeys(
        ("use_beam_search", "include_stop_str_in_output", "continue_final_message", "return_token_ids"),
        lambda value: value is False,
    ),
    **dict.fromkeys(
        ("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt", "detokenize"),
        lambda value: value is True,
    ),
    **dict.fromkeys(("audio", "moderation", "web_search_options"), lambda value: False),
    "modalities": lambda value: value == ["text"],
    "suffix": lambda value: value == "",
    "reasoning_effort": lambda value: value == "none",
    "verbosity": lambda value: value == "medium",
    "chat_template_kwargs": lambda value: value == {},
}
"""Unsupported fields, and whether a value asks for nothing."""


_KEPT = {"response_format": "schema", "tools": "parameters"}
"""Fields with JSON schemas inside, where null is a value, and what these are called."""


class BadField(QuantkitError):
    """A field of a request that is wrong.

    Attributes:
        name: the field.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class StreamOptions(Fields):
    """Options of a streamed response. Padding against guesses from lengths (``include_obfuscation``) is never added."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False

    @field_validator("continuous_usage_stats")
    @classmethod
    def _has_none(cls, value: bool) -> bool:
        if value:
            raise PydanticCustomError("continuous_usage_stats", "usage is only sent at the end; leave the field out")
        return value


def _stops(value: Any) -> Any:
    """Return stop strings as a list, checked before anything is done with them; an empty string alone is none."""
    strings = [value] if isinstance(value, str) and value else [] if value == "" else value
    if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
        raise PydanticCustomError("stop", "want a string or a list of strings")
    try:
        check_stops(strings)
    except QuantkitError as error:
        raise PydanticCustomError("stop", "{reason}", {"reason": str(error).removeprefix("stop: ")}) from error
    return strings


def _prompts(value: Any) -> Any:
    """Return prompts as a list of texts and of lists of token ids, in one pass over what may be a long list."""
    if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
        return [value]
    if isinstance(value, list) and (all(isinstance(one, str) for one in value) or all(map(_are_ids, value))):
        return value
    raise PydanticCustomError("prompt", "want text, a list of token ids, or a list of one of these")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)


def _bias(value: Any) -> Any:
    """Return biases by token id; JSON has only text as keys."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "want an object from token ids to numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", "want at most {most} tokens", {"most": MAX_BIASES})
    if not all(isinstance(token, str) and token.isdecimal() and len(token) < 12 for token in value):
        raise PydanticCustomError("logit_bias", 'want token ids as keys, such as "464"')
    return {int(token): bias for token, bias in value.items()}


_TEXT, _IDS = {"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_STOP_STRINGS = {"type": "array", "items": _TEXT, "maxItems": 64}
_STOPS = WithJsonSchema({"anyOf": [{"type": "string"}, _STOP_STRINGS]})
_SEVERAL = ({"type": "array", "items": one, "minItems": 1, "maxItems": 256} for one in (_TEXT, _IDS))
_PROMPTS = WithJsonSchema({"anyOf": [_TEXT, _IDS, *_SEVERAL]})
_BIASES = WithJsonSchema(
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,11}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_BIASES,
    }
)
"""How the description of the server shows what the functions above read."""


class Generating(Fields):
    """The fields that both kinds of request have. Those after ``stream_options`` are extensions of vLLM."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: Annotated[list[str], BeforeValidator(_stops), _STOPS] = Field(default_factory=list)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: Annotated[int, Field(ge=-1)] = -1
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: float = 1.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bias), _BIASES] = Field(
        default_factory=dict
    )
    response_format: ResponseFormat = ResponseFormat(type="text")

    def sampling(self, choice: int) -> Sampling:
        """Return the sampling parameters of choice number ``choice``; each choice of a request has a seed of its own.

        As in vLLM, ``top_k`` 0 and -1 mean all tokens, and the seed -1 a random one.
        """
        seed = None if self.seed is None or self.seed == -1 else (self.seed + choice) % 2**63
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        changes: dict[str, Any] = {name: getattr(self, name) for name in names}
        changes["logit_bias"] = {token: bias for token, bias in self.logit_bias.items() if bias}
        if self.temperature == 0:  # greedy decoding: filters have no effect
            return Sampling(seed=seed, **changes)
        top_k = 1 if self.top_p == 0 else self.top_k if self.top_k > 0 else None  # the smallest set has one token
        top_p = self.top_p if 0 < self.top_p < 1 else None
        return Sampling(self.temperature, top_k, top_p, self.min_p or None, seed=seed, **changes)

    @property
    def num_logprobs(self) -> int | None:
        """Number of alternatives whose log probabilities are requested; None for no log probabilities."""
        raise NotImplementedError


class Completion(Generating):
    """A request to /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts), _PROMPTS]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _answers_something(self) -> "Completion":
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "without echo, it should be greater than or equal to 1")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See :class:`Generating`."""
        return self.logprobs


class Part(BaseModel):
    """A part of a message; only text is supported. What else a client writes beside the text does not change it."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: str = "text"
    text: str = ""
    refusal: str = ""

    @model_validator(mode="after")
    def _is_text(self) -> "Part":
        if self.type not in ("text", "input_text", "output_text", "refusal"):
            raise PydanticCustomError("part", "{type} parts are not supported, only text", {"type": self.type[:40]})
        return self


class Message(Fields):
    """One message of a chat. Tool calls and their results go to the chat template as they are."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"enum": ["assistant", "tool", "function"]}}},
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
            ]
        },
    )
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    tool_call_id: str | None = None
    id: str | None = None
    annotations: list[Any] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role in ("system", "developer", "user"):
            raise PydanticCustomError("content", "a message of role {role} needs content", {"role": self.role})
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message in the form that chat templates use."""
        content = self.content or self.refusal or ""
        text = content if isinstance(content, str) else "".join(part.text or part.refusal for part in content)
        known = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        return {
            "role": {"developer": "system", "function": "tool"}.get(self.role, self.role),
            "content": text,
            **{name: value for name, value in known.items() if value is not None},
            **({"tool_calls": [_with_values(call) for call in self.tool_calls]} if self.tool_calls else {}),
        }


def _with_values(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as values instead of JSON, as chat templates want them."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": from_json(function["arguments"] or "{}")}}
    except ValueError:  # a model can write anything; the template gets what it wrote
        return call


class Chat(Generating):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20, description="Needs logprobs: true, unless it is 0.")] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, known: ValidationInfo) -> int | None:
        if value and not known.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "needs logprobs: true, without which none are returned")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """See :class:`Generating`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _chooses_a_tool(self) -> "Chat":
        chosen, names = self.tool_choice, [tool.function.name for tool in self.tools]
        if isinstance(chosen, ChosenTool) and chosen.function.name not in names:
            raise PydanticCustomError("tool_choice", "it names a function that tools does not have")
        if chosen == "required" and not names:
            raise PydanticCustomError("tool_choice", "there are no tools to choose from")
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two functions have one name")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools


def parse(body: Any, kind: type[Generating]) -> Any:
    """Return the request that a decoded body is.

    Args:
        body: the decoded JSON.
        kind: :class:`Completion` or :class:`Chat`.

    Raises:
        BadField: a field is unknown, unsupported, missing or wrong.
    """
    if not isinstance(body, dict):
        raise BadField("body", f"want a JSON object, got {_shown(body)}")
    _check_size(body)
    given: dict[str, Any] = {name: value for name, value in body.items() if value is not None and name not in FOR_ACCOUNTS}
    fields = {name: _without_nulls(value, _KEPT.get(name)) for name, value in given.items() if name != "logit_bias"}
    fields |= {"logit_bias": given["logit_bias"]} if "logit_bias" in given else {}
    if not isinstance(fields.get("best_of"), bool) and fields.get("best_of") == fields.get("n", 1):
        fields.pop("best_of", None)
    for name, asks_nothing in _NOTHING.items():
        if name in fields and not asks_nothing(fields.pop(name)):
            raise BadField(name, f"this server does not support {_shown(body[name])}; leave the field out")
    for name in fields:
        if name not in kind.model_fields:
            raise BadField(_cut(name), f"quantkit does not know this field; {nearest(_cut(name), kind.model_fields)}")
    for name, value in fields.items():
        if isinstance(value, float) and value.is_integer() and _takes_integers(kind.model_fields[name].annotation):
            fields[name] = int(value)  # in JSON, 2.0 is an integer, too
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from error


def _takes_integers(annotation: Any) -> bool:
    return annotation is int or any(map(_takes_integers, get_args(annotation)))


def _check_size(body: dict[str, Any]) -> None:
    """Refuse a body of very many values, since each may become a mistake to report. A prompt is checked in one pass."""
    waiting = [value for name, value in body.items() if name != "prompt"]
    for seen, value in enumerate(waiting):  # which grows meanwhile
        if seen > MAX_VALUES:
            raise BadField("body", f"more than {MAX_VALUES} values besides the prompt; send less at a time")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _without_nulls(value: Any, kept: str | None = None) -> Any:
    """Return a value without the fields that are null, at any depth, except in fields called ``kept``."""
    if isinstance(value, dict):
        return {name: one if name == kept else _without_nulls(one, kept) for name, one in value.items() if one is not None}
    return [_without_nulls(one, kept) for one in value] if isinstance(value, list) else value


def _explain(error: ValidationError) -> BadField:
    """Return the deepest mistake, which is the one in the variant of a field that fits best."""
    mistakes = error.errors(include_url=False, include_context=False)
    worst = max(mistakes, key=lambda mistake: len(mistake["loc"]))
    place = [name for part in worst["loc"] if (name := str(part)) != "str" and not name.startswith("list[")]
    given = worst["input"]
    if not place and worst["type"] in given:  # fields that do not go together
        place, given = [worst["type"]], given[worst["type"]]
    return BadField(_cut(".".join(place) or "body"), f"{worst['msg']}; got {_shown(given)}")


def _shown(value: Any) -> str:
    """Return a value as messages show it, not longer than a line."""
    return _cut(repr(value), 80)


def _cut(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
