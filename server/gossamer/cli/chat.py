"""`gossamer chat`: talk to a model of a running server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.errors import CommandError
from gossamer.cli.options import DEFAULT_URL, AsJson, Key, Url
from gossamer.cli.output import Output, show_error, write

if TYPE_CHECKING:
    from gossamer.cli.remote import Server

_HELP = """\
/model NAME    answer with another model from now on: base, sql, sql:3, "sql*0.7+math*0.3"
/system TEXT   another system message; without TEXT none
/reset         forget the conversation
/quit          leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass(eq=False)
class Conversation:
    """What has been said, and what the next answer is asked with.

    Attributes:
        messages: of user and assistant, in turn.
        options: of the request: max_tokens, temperature, seed.
    """

    model: str
    system: str | None
    options: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def request(self, text: str) -> dict[str, Any]:
        """The body that asks for the answer to `text`."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*head, *self.messages, {"role": "user", "content": text}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }

    def note(self, text: str, answer: str) -> None:
        """Keep a question and its answer."""
        self.messages.append({"role": "user", "content": text})
        self.messages.append({"role": "assistant", "content": answer})


def chat(
    model: Annotated[
        str,
        typer.Option(metavar="NAME", help='base, an adapter, or a merge like "a*0.7+b*0.3".'),
    ] = "base",
    message: Annotated[
        str | None,
        typer.Option("--message", "-m", metavar="TEXT", help="Answer this, then leave."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", min=0.0, max=2.0, help="0 is greedy.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Makes a temperature repeatable.")
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Talk to a model: answers come as they are made.

    Commands within: /model, /system, /reset, /help, /quit. Without a terminal every line of
    standard input is a message or a command.
    """
    from gossamer.cli.remote import Server

    output = Output(as_json)
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    conversation = Conversation(model, system, options)
    with Server(url, key) as server:
        if message is not None:
            answer(server, conversation, message, output)
        else:
            _talk(server, conversation, output)


def answer(server: Server, conversation: Conversation, text: str, output: Output) -> None:
    """Ask, show the answer as it comes, and keep both. Ctrl-C keeps what has come so far."""
    began = time.monotonic()
    first: float | None = None
    pieces: list[str] = []
    reason, usage = None, None
    try:
        for event in server.events("/v1/chat/completions", conversation.request(text)):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice["finish_reason"] or reason
                piece = choice["delta"].get("content") or ""
                if piece and first is None:
                    first = time.monotonic() - began
                pieces.append(piece)
                if not output.as_json:
                    write(sys.stdout, piece)
    except KeyboardInterrupt:
        reason = "interrupted"
    seconds = time.monotonic() - began
    conversation.note(text, "".join(pieces))
    tokens = (usage or {}).get("completion_tokens")
    document = {
        "model": conversation.model,
        "content": "".join(pieces),
        "finish_reason": reason,
        "usage": usage,
        "first_token_seconds": first,
        "seconds": seconds,
    }
    output.result(document)
    if not output.as_json:
        write(sys.stdout, "\n")
        if sys.stderr.isatty() and first is not None and tokens:
            output.note(f"[{tokens} tokens in {seconds:.1f} s, the first after {first:.2f} s]")


def _talk(server: Server, conversation: Conversation, output: Output) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        output.note(f"Talking to {conversation.model}. /help lists the commands.")
    for line in _lines(conversation, terminal):
        if line.startswith("/"):
            if not _obey(line, conversation, output):
                return
            continue
        try:
            answer(server, conversation, line, output)
        except CommandError as error:
            if not terminal:
                raise
            show_error(error)


def _lines(conversation: Conversation, terminal: bool) -> Iterator[str]:
    """What is typed, line by line, until its end."""
    if terminal:
        # its import gives `input` history and editing
        import readline  # noqa: F401
    while True:
        try:
            line = input(f"{conversation.model}> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            write(sys.stderr, "\nCtrl-D or /quit leaves.\n")
            continue
        if line:
            yield line


def _obey(line: str, conversation: Conversation, output: Output) -> bool:
    """Carry out a command; False when it was the last."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/quit":
        return False
    if command == "/model" and rest:
        conversation.model = rest
    elif command == "/system":
        conversation.system = rest or None
    elif command == "/reset":
        conversation.messages.clear()
    elif command == "/help":
        output.note(_HELP)
    else:
        output.note(f"{line!r} is no command.\n{_HELP}")
    return True
