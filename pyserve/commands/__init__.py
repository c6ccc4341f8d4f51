"""``pyserve ask``, ``attach`` and ``stop``: the client in a terminal.

All three take ``[URL]`` in front of what they are about.
"""

from __future__ import annotations

import secrets
import sys
from typing import Any

import click

from pyserve.client import ByteStream, Client, Connection, EventStream
from pyserve.client.deltas import read_delta
from pyserve.commands.arguments import (
    UTF8,
    about,
    make_client,
    read_question,
    require_stdout,
)
from pyserve.commands.running import STATUS_HELP, CommandFailedError, ExitStatus, run
from pyserve.commands.screen import Screen, say, say_how_to_attach

_ASK_EPILOG = f"""\
\b
Examples:
  pyserve ask "What is a log?"
  pyserve ask --id notes-1 "Summarise this: $(cat notes.txt)" > summary.txt
  git diff | pyserve ask http://gpu:8000 -        the question comes from stdin

{STATUS_HELP}"""

_ATTACH_EPILOG = f"""\
\b
Examples:
  pyserve attach notes-1
  pyserve attach http://gpu:8000 notes-1
  pyserve attach --raw --from earliest notes-1 > notes-1.sse

{STATUS_HELP}"""

_STOP_EPILOG = f"""\
\b
Examples:
  pyserve stop notes-1
  pyserve stop --keep http://gpu:8000 notes-1

{STATUS_HELP}"""


@click.command(epilog=_ASK_EPILOG)
@about("TEXT")
@click.option("--model", type=UTF8, help="The model to ask, where the server has several.")
@click.option(
    "--id",
    "conversation_id",
    type=UTF8,
    metavar="ID",
    help="The conversation's id; else random.",
)
def ask(
    word: str, url: str, model: str | None, conversation_id: str | None, **options: Any
) -> None:
    """Ask the model, and print the answer as it comes.

    The conversation's id goes to stderr: with it the answer can be read again, from anywhere, also
    while it is being written. Ctrl-C only leaves: the generation goes on.
    """
    client = make_client(url, **options)
    screen = Screen(require_stdout())
    request: dict[str, Any] = {"messages": [{"role": "user", "content": read_question(word)}]}
    if model is not None:
        request["model"] = model
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
    run(_follow(client, stream, screen), lambda: say_how_to_attach(client, stream))


@click.command(epilog=_ATTACH_EPILOG)
@about("CONVERSATION")
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
    client = make_client(url, **options)
    screen = Screen(require_stdout())
    try:
        if raw:
            log = client.read_log(word, from_=position, on_connection=screen.on_connection)
            run(_copy(client, log), lambda: say_how_to_attach(client, log, "--raw"))
        stream = client.attach(
            word, from_=position, on_gap=screen.on_gap, on_connection=screen.on_connection
        )
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
    run(_follow(client, stream, screen), lambda: say_how_to_attach(client, stream))


@click.command(epilog=_STOP_EPILOG)
@about("CONVERSATION")
@click.option("--keep", is_flag=True, help="Keep what was written until it expires.")
def stop(word: str, url: str, keep: bool, **options: Any) -> None:
    """Stop a generation, and drop what it has written.

    Whoever follows it gets all up to here.
    """
    client = make_client(url, **options)
    run(_stop(client, word, keep), lambda: say("interrupted; perhaps it was stopped"))


async def _follow(client: Client, stream: EventStream, screen: Screen) -> ExitStatus:
    """Print a stream as text, to its end."""
    told_error = ""
    async with client:
        async for event in stream:
            delta = read_delta(event)
            told_error = delta.error or told_error
            screen.show(delta)
    screen.end_line()
    if stream.state == "failed":
        say(f"the generation failed: {told_error or 'no message'} ({stream.reason})")
    elif told_error:  # the upstream's own, in a stream that it then ended
        say(f"the generation ended with an error: {told_error}")
        return ExitStatus.FAILED
    return _status(stream)


async def _copy(client: Client, log: ByteStream) -> ExitStatus:
    """Print a stream's bytes, to its end."""
    out = sys.stdout.buffer
    async with client:
        async for block in log:
            out.write(block)
            out.flush()
    if log.state == "failed":
        say(f"the generation failed ({log.reason})")
    return _status(log)


def _status(stream: EventStream | ByteStream) -> ExitStatus:
    if stream.state == "cancelled":
        say("stopped")
        return ExitStatus.CANCELLED
    return ExitStatus.COMPLETE if stream.state == "completed" else ExitStatus.FAILED


async def _stop(client: Client, conversation_id: str, keep: bool) -> ExitStatus:
    async with client:
        found = await client.lookup([conversation_id])
        for info in found:
            if info.conversation_id == conversation_id:
                await client.stop(conversation_id, keep=keep, epoch=info.epoch)
                say("stopped" if info.is_live else f"it was over before: {info.state}")
                return ExitStatus.COMPLETE
    raise CommandFailedError(f"there is no stream of {conversation_id!r}", ExitStatus.GONE)


COMMANDS = [ask, attach, stop]
