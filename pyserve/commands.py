"""``pyserve ask``, ``attach`` and ``stop``: the client in a terminal.

All three take ``[URL]`` in front of what they are about.
"""

from __future__ import annotations

import asyncio
import io
import re
import secrets
import shlex
import sys
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from pyserve.client import (
    ActiveError,
    AnswerError,
    ByteStream,
    Client,
    ClientError,
    Connection,
    EventStream,
    Gap,
    GoneError,
    NotPyserveError,
    OffsetLostError,
    ReplacedError,
    UnavailableError,
    UnreachableError,
)
from pyserve.client.deltas import Delta, read_delta

DEFAULT_URL = "http://127.0.0.1:8000"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GONE = 3
EXIT_CANCELLED = 4
EXIT_UNREACHABLE = 5
EXIT_DETACHED = 130  # 128 + SIGINT, as shells have it

_STATUS_HELP = """\
\b
Exit status:
  0    the stream is complete
  1    the generation failed, or the server refused the request
  2    wrong usage
  3    no such stream (any more), or not the bytes that were asked for
  4    it was stopped, or replaced by a newer one
  5    the server cannot be reached, or stayed away too long
  130  detached by Ctrl-C; the generation goes on
"""

_ASK_EPILOG = f"""\
\b
Examples:
  pyserve ask "What is a log?"
  pyserve ask --id notes-1 "Summarise this: $(cat notes.txt)" > summary.txt
  git diff | pyserve ask http://gpu:8000 -        the question comes from stdin

{_STATUS_HELP}"""

_ATTACH_EPILOG = f"""\
\b
Examples:
  pyserve attach notes-1
  pyserve attach http://gpu:8000 notes-1
  pyserve attach --raw --from earliest notes-1 > notes-1.sse

{_STATUS_HELP}"""

_STOP_EPILOG = """\
\b
Examples:
  pyserve stop notes-1
  pyserve stop --keep http://gpu:8000 notes-1

\b
Exit status: 0 stopped (or over before), 1 refused, 2 wrong usage, 3 no such stream,
5 the server cannot be reached.
"""

_LEADING_URL = "pyserve.leading_url"

# What could move the cursor, or worse, when a model writes it to a terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _CommandFailedError(Exception):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _clean(text: str) -> str:
    """Without what would move the cursor, or worse: a terminal takes orders from what it shows."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def _say(text: str) -> None:
    click.echo(f"pyserve: {_clean(text)}", err=True)


# --- arguments and options that they share


def _words(what: str) -> Callable[[Any], Any]:
    """``[URL] WHAT`` and ``--url``, as the parameters `client_url` and `word`."""

    def split(context: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> str:
        *urls, word = words
        if len(urls) > 1:
            raise click.UsageError(f"Too many arguments: [URL] {what} is all. Quote a text.")
        if urls and not urls[0].startswith(("http://", "https://")):
            raise click.UsageError(f"{urls[0]!r} is not an http:// or https:// URL.")
        context.meta[_LEADING_URL] = urls[0] if urls else None
        return word

    def decorate(command: Any) -> Any:
        argument = click.argument(
            "word", nargs=-1, required=True, metavar=f"[URL] {what}", callback=split
        )
        url = click.option(
            "--url",
            envvar="PYSERVE_URL",
            show_envvar=True,
            default=DEFAULT_URL,
            show_default=True,
            help="The server's URL, where it doesn't stand in front.",
        )
        key = click.option(
            "--api-key",
            metavar="KEY",
            envvar="PYSERVE_API_KEY",
            show_envvar=True,
            help="Sent as Authorization: Bearer.",
        )
        give_up = click.option(
            "--give-up-after",
            metavar="SECONDS",
            type=click.FloatRange(min=0),
            default=60.0,
            show_default=True,
            help="How long to go on trying when the connection is lost.",
        )
        return argument(url(key(give_up(command))))

    return decorate


def _client(url: str, api_key: str | None, give_up_after: float) -> Client:
    context = click.get_current_context()
    leading_url = context.meta[_LEADING_URL]
    if leading_url and context.get_parameter_source("url") is ParameterSource.COMMANDLINE:
        raise click.UsageError("The URL is given twice.")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return Client(leading_url or url, headers=headers, give_up_after_s=give_up_after)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error


# --- running


def _run(work: Awaitable[int], on_interrupt: Callable[[], None]) -> NoReturn:
    """Run to an exit status; a client's errors become one line."""

    async def main() -> int:
        return await work

    try:
        status = asyncio.run(main())
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            click.echo(err=True)  # behind the terminal's ^C
        on_interrupt()
        status = EXIT_DETACHED
    except (ClientError, _CommandFailedError) as error:
        failure = _explained(error) if isinstance(error, ClientError) else error
        click.echo(f"Error: {_clean(str(failure))}", err=True)
        status = failure.status
    sys.exit(status)


def _explained(error: ClientError) -> _CommandFailedError:
    match error:
        case OffsetLostError():
            message = (
                "the bytes from there on are no longer kept;"
                f" --from earliest begins at byte {error.first_offset}"
            )
            return _CommandFailedError(message, EXIT_GONE)
        case GoneError():
            message = "there is no such stream: it never was, has expired, or was stopped"
            return _CommandFailedError(message, EXIT_GONE)
        case ReplacedError():
            return _CommandFailedError("the stream was replaced by a newer one", EXIT_GONE)
        case ActiveError():
            message = "this conversation is being answered: attach to it, stop it, or take another"
            return _CommandFailedError(message, EXIT_FAILED)
        case UnreachableError(first_contact=True):
            return _CommandFailedError(f"cannot connect to {error}", EXIT_UNREACHABLE)
        case UnreachableError() | UnavailableError() | NotPyserveError():
            return _CommandFailedError(str(error), EXIT_UNREACHABLE)
        case AnswerError(reason="invalid_offset" | "offset_ahead" | "invalid_conversation_id"):
            return _CommandFailedError(str(error), EXIT_USAGE)
    return _CommandFailedError(str(error), EXIT_FAILED)


class _Screen:
    """Text to stdout as it comes, what else there is to say to stderr."""

    def __init__(self) -> None:
        self._out = sys.stdout
        if isinstance(self._out, io.TextIOWrapper):
            self._out.reconfigure(errors="replace")
        self._is_terminal = self._out.isatty()
        self._at_line_start = True
        self._in_reasoning = False
        self._connected = False
        self._lost = False

    def show(self, delta: Delta) -> None:
        """Print a piece. What a model thinks is for the eye only: a file gets the answer."""
        if delta.reasoning and self._is_terminal:
            self._in_reasoning = True
            self._write(delta.reasoning, dim=True)
        if delta.text:
            if self._in_reasoning:
                self._in_reasoning = False
                self._write("\n\n")
            self._write(delta.text)
        self._out.flush()

    def _write(self, text: str, *, dim: bool = False) -> None:
        if self._is_terminal:
            text = _clean(text)
        self._at_line_start = text.endswith("\n")
        self._out.write(click.style(text, dim=True) if dim else text)

    def end_line(self) -> None:
        """On a terminal, what follows stands on a line of its own."""
        if self._is_terminal and not self._at_line_start:
            self._out.write("\n")
            self._at_line_start = True
        self._out.flush()

    def tell(self, text: str) -> None:
        """A line on stderr."""
        self.end_line()
        _say(text)

    def on_connection(self, news: Connection) -> None:
        """Say when the connection is lost, once, and when it is back."""
        if news.error is not None:
            if not self._lost:
                self.tell(f"{news.error}; trying again")
            self._lost = True
            return
        if self._lost and self._connected:
            self.tell(f"attached again at byte {news.offset}")
        self._lost = False
        self._connected = True

    def on_gap(self, gap: Gap) -> None:
        """Say what is missing."""
        self.tell(f"[bytes {gap.first} to {gap.end} are no longer kept]")


async def _follow(client: Client, stream: EventStream, screen: _Screen) -> int:
    """Print a stream as text, to its end. Returns the exit status."""
    told_error = ""
    async with client:
        async for event in stream:
            delta = read_delta(event)
            told_error = delta.error or told_error
            screen.show(delta)
    screen.end_line()
    if stream.state == "failed":
        screen.tell(f"the generation failed: {told_error or 'no message'} ({stream.reason})")
        return EXIT_FAILED
    if told_error:  # the upstream's own, in a stream that it then ended
        screen.tell(f"the generation ended with an error: {told_error}")
        return EXIT_FAILED
    return _status(stream)


def _status(stream: EventStream | ByteStream) -> int:
    if stream.state == "cancelled":
        _say("stopped")
    return {"completed": 0, "cancelled": EXIT_CANCELLED}.get(stream.state, EXIT_FAILED)


def _say_how_to_attach(client: Client, stream: EventStream | ByteStream, options: str = "") -> None:
    words = ["--" if stream.conversation_id.startswith("-") else "", client.base_url]
    at = f"--from {stream.position}" if stream.position else ""
    command = ["pyserve attach", options, at, *words, shlex.quote(stream.conversation_id)]
    if stream.epoch is not None:
        _say("detached; the generation goes on. Attach again with:")
    else:
        _say("interrupted before the server answered. If the generation has begun, attach with:")
    click.echo(f"  {' '.join(filter(None, command))}", err=True)


# --- the commands


@click.command(epilog=_ASK_EPILOG)
@_words("TEXT")
@click.option("--model", help="The model to ask, where the server has several.")
@click.option("--id", "conversation_id", metavar="ID", help="The conversation's id; else random.")
def ask(
    word: str, url: str, model: str | None, conversation_id: str | None, **options: Any
) -> None:
    """Ask the model, and print the answer as it comes.

    The conversation's id goes to stderr: with it the answer can be read again, from anywhere, also
    while it is being written. Ctrl-C only leaves: the generation goes on.
    """
    client = _client(url, **options)
    text = sys.stdin.read() if word == "-" else word
    request: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    if model is not None:
        request["model"] = model
    screen = _Screen()
    named = False

    def on_connection(news: Connection) -> None:
        nonlocal named
        if news.error is None and not named:
            named = True
            click.echo(f"conversation: {stream.conversation_id}", err=True)
        screen.on_connection(news)

    stream = client.submit(
        request,
        conversation_id or secrets.token_hex(6),
        on_conflict="reject",  # a slip of the finger must not stop what is being written
        on_gap=screen.on_gap,
        on_connection=on_connection,
    )
    _run(_follow(client, stream, screen), lambda: _say_how_to_attach(client, stream))


@click.command(epilog=_ATTACH_EPILOG)
@_words("CONVERSATION")
@click.option(
    "--from",
    "position",
    metavar="POSITION",
    default="0",
    help="Where to begin: a number of bytes, an event id, or 'earliest'. Default: the start.",
)
@click.option("--raw", is_flag=True, help="Print the stream's bytes as they are, not its text.")
def attach(word: str, url: str, position: str, raw: bool, **options: Any) -> None:
    """Follow a stream, live or over, to its end.

    Prints the text of chat completions and their kin, anything else as it is; what a model thinks
    is dimmed, and left out where the output is not a terminal. Comes back by itself when the
    connection is lost. Ctrl-C only leaves: the generation goes on.
    """
    client = _client(url, **options)
    screen = _Screen()
    try:
        if raw:
            log = client.read_log(word, from_=position, on_connection=screen.on_connection)
            _run(_copy(client, log), lambda: _say_how_to_attach(client, log, "--raw"))
        stream = client.attach(
            word, from_=position, on_gap=screen.on_gap, on_connection=screen.on_connection
        )
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    _run(_follow(client, stream, screen), lambda: _say_how_to_attach(client, stream))


async def _copy(client: Client, log: ByteStream) -> int:
    out = sys.stdout.buffer
    async with client:
        async for block in log:
            out.write(block)
            out.flush()
    if log.state == "failed":
        _say(f"the generation failed ({log.reason})")
    return _status(log)


@click.command(epilog=_STOP_EPILOG)
@_words("CONVERSATION")
@click.option("--keep", is_flag=True, help="Keep what was written until it expires.")
def stop(word: str, url: str, keep: bool, **options: Any) -> None:
    """Stop a generation, and drop what it has written.

    Whoever follows it gets all up to here.
    """
    client = _client(url, **options)
    _run(_stop(client, word, keep), lambda: _say("interrupted; perhaps it was stopped"))


async def _stop(client: Client, conversation_id: str, keep: bool) -> int:
    async with client:
        found = await client.lookup([conversation_id])
        for info in found:
            if info.conversation_id == conversation_id:
                await client.stop(conversation_id, keep=keep, epoch=info.epoch)
                _say("stopped" if info.is_live else f"it was over before: {info.state}")
                return 0
    raise _CommandFailedError(f"there is no stream of {conversation_id!r}", EXIT_GONE)


COMMANDS = [ask, attach, stop]
