"""From rows to texts: which column is the text, and conversations through a chat template.

Three kinds of rows are known. *Text*: a column ``text``, or the only one that holds strings. *Conversations*: ``messages`` or
``conversations``, a list of messages with ``role`` and ``content``, or ``from`` and ``value``; a column ``tools`` goes along.
*Pairs*: a question (``prompt``, ``instruction``, ``question``, ``query``; ``input`` is appended to an instruction) and an
answer (``response``, ``completion``, ``output``, ``answer``), with a ``system`` message if there is one; they become
conversations. Rows that could be several of these are an error that lists the columns: nothing is guessed.

Conversations become what the model reads in use by the tokenizer's chat template, or by one that is given
(:mod:`quantkit.calibrate.chat`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.calibrate.chat import Chat, Message, Passage, check_content
from quantkit.calibrate.sources import Part, Row
from quantkit.errors import CalibrationError, nearest

CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("response", "completion", "output", "answer")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
"""What datasets with ``from`` and ``value`` call the roles; others are taken as they are."""

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class Choice:
    """Which columns of a part are read, and as what.

    Attributes:
        kind: ``"text"``, ``"conversation"`` or ``"pair"``.
        names: the column, or question and answer.
    """

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "+".join(self.names)


def passages_of(part: Part, column: str | None, chat: Chat) -> tuple[list[Passage], str]:
    """Return the texts of a part, blank ones left out, and the columns that were read (empty for texts without columns).

    Args:
        part: rows.
        column: the text, the conversation, or question and answer joined by ``+``; None finds out.
        chat: for conversations.

    Raises:
        CalibrationError: the column is not there or not clear, a row is of another kind or has no message, or the template
            refuses it.
    """
    tables = [row for row in part.rows if not isinstance(row, str)]
    if len(tables) not in (0, len(part.rows)):
        raise CalibrationError(
            f"{part.name}: {len(tables)} of {len(part.rows)} rows have columns, the others are text; want one"
        )
    if not tables:
        rows = [(_place(part, i), row) for i, row in enumerate(part.rows) if isinstance(row, str) and row.strip()]
        return [_plain(row, place, "give the row as a mapping, as json.loads returns it") for place, row in rows], ""
    choice = choose(part, column or part.column or None)
    if choice.kind == "text":
        if chat.template is not None:
            raise CalibrationError(f"{part.name}: template= is for conversations, and column {choice} is text; leave it out")
        texts = [(_place(part, i), _text(row, choice.names[0], _place(part, i))) for i, row in enumerate(tables)]
        way_out = f"remove the row, or say column={str(choice)!r} if all rows are"
        return [_plain(text, place, way_out) for place, text in texts if text.strip()], str(choice)
    found = []
    for index, row in enumerate(tables):
        place = _place(part, index)
        messages = _conversation(row, choice, place)
        found.append(chat.render(messages, _tools(row, place), place))
    return found, str(choice)


def _plain(text: str, place: str, way_out: str) -> Passage:
    """Return a text as it is; an error for a conversation written as JSON, whose brackets would be calibrated with."""
    if _holds_messages(text):
        raise CalibrationError(f"{place}: it is a conversation written as JSON, want text; {way_out}")
    return Passage(text, place)


def choose(part: Part, column: str | None) -> Choice:
    """Return which columns of a part's rows are read.

    Raises:
        CalibrationError: there is no such column, none that is known, or several kinds.
    """
    samples: dict[str, Any] = {}  # column to its first value that says something
    for row in part.rows:
        assert not isinstance(row, str)
        for key, value in row.items():
            if key not in samples or (value is not None and samples[key] in (None, "", [])):
                samples[key] = value
    if column is not None:
        return _named(part, column, samples)
    texts = [key for key, value in samples.items() if isinstance(value, str)]
    found = [Choice("conversation", (key,)) for key in CONVERSATIONS if _is_conversation(samples.get(key))]
    question, answer = (next((key for key in keys if key in samples), None) for keys in (QUESTIONS, ANSWERS))
    found += [Choice("pair", (question, answer))] if question and answer else []
    found += [Choice("text", ("text",))] if "text" in texts else []
    found = found or [Choice("text", (key,)) for key in texts]
    if len(found) == 1:
        return found[0]
    why = f"it could be {', '.join(map(str, found))}" if found else "none holds text or a conversation"
    raise CalibrationError(
        f"{part.name}: which column is the text is not clear: {why}; columns: {_names(samples)}; name one with column=, or "
        "question and answer with column='prompt+response'"
    )


def _named(part: Part, column: str, samples: Mapping[str, Any]) -> Choice:
    names = (column,) if column in samples else tuple(name.strip() for name in column.split("+"))
    if missing := [name for name in names if name not in samples]:
        raise CalibrationError(f"{part.name}: no column of text {missing[0]!r}; {nearest(missing[0], samples)}")
    if len(names) > 2:
        raise CalibrationError(f"{part.name}: column={column!r} names {len(names)} columns; want one, or question+answer")
    if len(names) == 2:
        return Choice("pair", names)
    value = samples[column]
    if (column in CONVERSATIONS and _is_conversation(value)) or _holds_messages(value):
        return Choice("conversation", names)
    if not isinstance(value, str | list | tuple):
        raise CalibrationError(
            f"{part.name}: column {column!r} holds {type(value).__name__}; want text or lists of messages; "
            f"columns: {_names(samples)}"
        )
    return Choice("text" if isinstance(value, str) else "conversation", names)


def _is_conversation(value: Any) -> bool:
    """Return whether a value can be a list of messages; in a table of texts it is written as JSON."""
    return value.lstrip()[:1] in ("[", "{") if isinstance(value, str) else isinstance(value, list | tuple)


def _holds_messages(value: Any) -> bool:
    """Return whether a value is a text that is a list of messages, or a row with one, written as JSON."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return False
    if isinstance(found, dict):
        found = next((found[key] for key in CONVERSATIONS if key in found), [found])
    return isinstance(found, list) and bool(found) and all(isinstance(one, dict) and _is_message(one) for one in found)


def _is_message(one: Mapping[str, Any]) -> bool:
    return {"role", "content"} <= one.keys() or {"from", "value"} <= one.keys()


def _names(columns: Mapping[str, Any]) -> str:
    shown = [*columns][:20]
    return ", ".join([*shown, *([f"and {len(columns) - 20} more"] if len(columns) > 20 else [])]) or "none"


def _place(part: Part, index: int) -> str:
    return part.name if len(part.rows) == 1 else f"{part.name}, row {index + 1}"


def _text(row: Row, column: str, place: str) -> str:
    """Return a column's text; a missing value is an empty text, a missing column an error."""
    assert not isinstance(row, str)
    if column not in row:
        raise CalibrationError(f"{place}: no column {column!r}, which other rows have; it has {_names(row)}")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{place}: column {column!r} is a {type(value).__name__}, want text")
    return value or ""


def _conversation(row: Row, choice: Choice, place: str) -> list[Message]:
    assert not isinstance(row, str)
    messages = _messages(row, choice.names[0], "user", place)
    if choice.kind == "pair":
        extra = _text(row, "input", place) if choice.names[0] != "input" and row.get("input") else ""
        if extra.strip() and messages:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{extra}"
        messages += _messages(row, choice.names[1], "assistant", place)
    system = next((row[key] for key in ("system", "system_prompt") if isinstance(row.get(key), str) and row[key].strip()), None)
    if system is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise CalibrationError(f"{place}: column {choice.names[0]!r} has no message; remove the row")
    return messages


def _messages(row: Mapping[str, Any], column: str, role: str, place: str) -> list[Message]:
    """Return the messages of a column; a plain text is one message of ``role``."""
    if column not in row:
        raise CalibrationError(f"{place}: no column {column!r}, which other rows have; it has {_names(row)}")
    value = row[column]
    if isinstance(value, str) and (column in CONVERSATIONS or _holds_messages(value)):
        value = _json(value, f"{place}, column {column!r}")
    if isinstance(value, str):
        if not value.strip():
            raise CalibrationError(f"{place}: column {column!r} is empty; remove the row")
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
        raise CalibrationError(f"{place}: column {column!r} is a {type(value).__name__}, want a list of messages, or text")
    return [_message(one, f"{place}, message {number}") for number, one in enumerate(value, start=1)]


def _message(one: Mapping[str, Any], place: str) -> Message:
    said = _without_none(one)
    role = said.pop("role", None) or said.pop("from", None)
    content = said.pop("content", None)
    content = said.pop("value", None) if content is None else content
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        known = ", ".join(KNOWN_ROLES)
        raise CalibrationError(f"{place}: role {role!r}; want role and content, or from and value, with a role of {known}")
    if content is None and not said:
        raise CalibrationError(f"{place}: a message of {role} without content; want role and content, or from and value")
    check_content(content, place)
    return {"role": role, "content": "" if content is None else content, **said}


def _tools(row: Row, place: str) -> Any:
    assert not isinstance(row, str)
    tools = row.get("tools") or None
    tools = _json(tools, f"{place}, column 'tools'") if isinstance(tools, str) else tools
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)):
        raise CalibrationError(f"{place}: column 'tools' is a {type(tools).__name__}, want a list of tools' JSON schemas")
    return [_without_none(tool) for tool in tools] if tools else None


def _without_none(value: Any) -> Any:
    """Return nested values without the missing ones: columns of a table have every key that any row has."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is text that is no valid JSON: {error}") from error
