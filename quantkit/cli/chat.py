"""The command chat: a conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli import app
from quantkit.cli.console import say
from quantkit.cli.groups import Opening, Running, Sampled, values
from quantkit.cli.options import MaxNewTokens, Model, engine_options, load
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.engine.sampling import Sampling
    from quantkit.generation.chat import Conversation

HELP = "/reset forgets what was said, /exit leaves (so does Ctrl-D); Ctrl-C ends an answer; a line that ends with \\ goes on."


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told first, as in: You are terse.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    *,
    sampled: Sampled,
    running: Running,
    opening: Opening,
) -> None:
    """Talk to a model. Lines of a pipe are turns, too: echo "Who are you?" | quantkit chat MODEL"""
    from quantkit.engine.sampling import Sampling
    from quantkit.generation.chat import Conversation

    opened, tokenizer = load(model, **values(opening))
    talk = Conversation(opened, tokenizer, system, compute=opening.compute, **engine_options(running))
    sampling = Sampling(**values(sampled))
    say(f"{model}: {talk.runs}, up to {talk.context_tokens} tokens. {HELP}", stderr=True)
    while (line := _read()) is not None:
        if line == "/exit":
            break
        if not _obey(talk, line):
            _answer(talk, line, sampling, max_new_tokens)


def _read() -> str | None:
    """Return a turn of the user; None at the end of the input."""
    terminal, lines = sys.stdin.isatty(), list[str]()
    while True:
        try:
            line = input("> " if terminal and not lines else ". " if terminal else "")
        except EOFError:
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            typer.echo()
            return None
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()


def _obey(talk: "Conversation", line: str) -> bool:
    """Carry out a command of the conversation, or nothing for an empty line; return whether it was one."""
    if line == "/reset":
        talk.reset()
        say("forgotten", stderr=True)
    elif line.startswith("/"):
        say(HELP if line == "/help" else f"{line.split()[0]} is no command; {HELP}", stderr=True)
    return line.startswith("/") or not line


def _answer(talk: "Conversation", line: str, sampling: "Sampling", max_new_tokens: int) -> None:
    """Show the model's answer as it comes."""

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)
        sys.stdout.flush()

    try:
        _, reason = talk.say(line, show, max_new_tokens=max_new_tokens, sampling=sampling)
    except QuantkitError as error:  # too long, or against the template: the conversation goes on without this turn
        say(f"error: {error}", stderr=True)
        return
    typer.echo()
    if reason != "stop":
        why = "interrupted" if reason is None else f"cut after {max_new_tokens} tokens; --max-new-tokens allows more"
        say(f"[{why}]", stderr=True)
