"""Tool calls: how models write them, the grammars that make them do it right, and how they are found in an answer.

Each family of models was trained on a form of its own, which its chat template shows. Two cover most of them:

- ``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``, several, after any text: Hermes, Qwen 3, SmolLM 3.
- ``{"name": "f", "parameters": {...}}`` as the whole answer: Llama 3.1 and later.

With tools, an answer follows a grammar: text as it comes, but a call, once begun, names one of the tools and has arguments of
its schema. ``tool_choice`` then only removes the text. A model whose template shows another form is refused by name.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from quantkit.errors import QuantkitError
from quantkit.serve.forms import ChosenTool, Tool
from quantkit.serve.grammar import json_grammar, lark_grammar, written


@dataclass(frozen=True, slots=True)
class Dialect:
    """A form of tool calls.

    Attributes:
        begin, end: what stands around each call; empty if a call is the whole answer.
        arguments: the name of the field with the arguments.
    """

    begin: str
    end: str
    arguments: str


HERMES = Dialect("<tool_call>", "</tool_call>", "arguments")
LLAMA = Dialect("", "", "parameters")


def dialect_of(template: object) -> Dialect:
    """Return the form of tool calls that a chat template shows.

    Args:
        template: text of the template, or several by name.

    Raises:
        QuantkitError: the template knows no tools, or shows a form that is not known here.
    """
    text = str(template)
    if "tools" not in text:
        raise QuantkitError("tools: the model's chat template knows no tools; take a model that was taught to call them")
    if "<tool_call>" in text and not any(other in text for other in ("<arg_key>", "<function=")):
        return HERMES
    if "parameters" in text and '{"name":' in text and "[TOOL_CALLS]" not in text:
        return LLAMA
    raise QuantkitError(
        "tools: the model's chat template writes tool calls in a form that quantkit does not know; it knows "
        "<tool_call>{...}</tool_call> (Qwen, Hermes) and a single JSON object (Llama 3)"
    )


def form_grammar(
    dialect: Dialect, tools: Sequence[Tool], choice: str | ChosenTool, schema: dict[str, Any] | bool | None, *, several: bool
) -> str:
    """Return the grammar of answers that may call tools.

    Args:
        dialect: the form of calls.
        tools: the tools, at least one.
        choice: ``"auto"``, ``"required"``, or the only tool that may be called.
        schema: the JSON schema of an answer without a call; None for any text.
        several: more than one call is allowed, where the dialect can write them, unless ``choice`` is a tool.
    """
    if not isinstance(choice, str):
        tools, several = [tool for tool in tools if tool.function.name == choice.function.name], False
    required, rules = choice != "auto", ["%llguidance {}"]
    names = [f"call_{number}" for number in range(len(tools))]
    rules += (f"{name}: %json {written(_call_schema(tool, dialect))}" for name, tool in zip(names, tools, strict=True))
    rules.append(f"body: {' | '.join(names)}")
    if schema is not None:
        rules.append(f"text: %json {written(schema)}")
    if not dialect.begin:
        other = "text" if schema is not None else "/([^{](.|\\n)*)?/"
        rules.append("start: body" if required else f"start: body | {other}")
        return lark_grammar("\n".join(rules))
    begin, end, more = json.dumps(dialect.begin), json.dumps(dialect.end), " (GAP call)*" if several else ""
    rules.append(f"inside: GAP body GAP {end}")
    rules += (f"call: {begin} inside", r"GAP: /\n?/")
    if required or schema is not None:
        calls = f"call{more}"
        rules.append(f"start: {calls}" if required else f"start: text | {calls}")
        return lark_grammar("\n".join(rules))
    rules += (r"TEXT: /(.|\n)*/", f"first[lazy]: TEXT {begin}")
    rules.append(f"start: TEXT | first inside{more}")
    return lark_grammar("\n".join(rules))


def _call_schema(tool: Tool, dialect: Dialect) -> dict[str, Any]:
    """Return the JSON schema of a call. Definitions stay where references look for them, at the root."""
    parameters = dict(tool.function.parameters)
    definitions: dict[str, Any] = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    return {
        **definitions,
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, dialect.arguments: parameters},
        "required": ["name", dialect.arguments],
        "additionalProperties": False,
    }


def text_grammar(schema: dict[str, Any] | bool) -> str:
    """Return the grammar of answers that are JSON of a schema."""
    return json_grammar(schema)


class CallFinder:
    """Divides the text of an answer, piece by piece, into content and tool calls.

    Args:
        dialect: the form of calls.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect, self._held, self.calls = dialect, "", 0

    def add(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Add a piece; return the content and the calls that are complete with it.

        Args:
            text: the piece.
            last: nothing follows, so what is held becomes content.
        """
        self._held += text
        content, calls = "", list[dict[str, Any]]()
        while True:
            start = self._start()
            content, self._held = content + self._held[:start], self._held[start:]
            found = self._call(last)
            if found is None:
                break
            call, length = found
            self._held = self._held[length:]
            calls.append({"index": self.calls, **call})
            self.calls += 1
        if last:
            content, self._held = content + self._held, ""
        return ("" if self.calls and not content.strip() else content), calls

    def _start(self) -> int:
        """Return how many characters of what is held are content: all before a call, or before what may become one."""
        begin = self._dialect.begin
        if not begin:
            blank = len(self._held) - len(self._held.lstrip())
            return 0 if self._held[blank:].startswith("{") or blank == len(self._held) else len(self._held)
        where = self._held.find(begin)
        if where >= 0:
            return where
        partial = next((size for size in range(len(begin) - 1, 0, -1) if self._held.endswith(begin[:size])), 0)
        return len(self._held) - partial

    def _call(self, last: bool) -> tuple[dict[str, Any], int] | None:
        """Return the call at the start of what is held and its length, if it is complete."""
        begin, end = self._dialect.begin, self._dialect.end
        if not self._held.startswith(begin) or (not end and not last):
            return None
        stop = self._held.find(end) if end else len(self._held)
        if stop < 0:
            return None
        try:
            found = from_json(self._held[len(begin) : stop].strip())
        except ValueError:  # not written under a grammar, or cut
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = json.dumps(found.get(self._dialect.arguments, {}), ensure_ascii=False)
        function = {"name": found["name"], "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}, stop + len(end)
