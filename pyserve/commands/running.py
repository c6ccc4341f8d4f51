"""From a command's work to its exit status."""

from __future__ import annotations

import asyncio
import enum
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import click

from pyserve.client import (
    ActiveError,
    AnswerError,
    ClientError,
    GoneError,
    NotPyserveError,
    OffsetLostError,
    ReplacedError,
    UnavailableError,
    UnreachableError,
)
from pyserve.commands.screen import clean


class ExitStatus(enum.IntEnum):
    """All that there are, in the words that ``--help`` shows."""

    words: str

    def __new__(cls, status: int, words: str) -> ExitStatus:
        """A number with its words."""
        member = int.__new__(cls, status)
        member._value_ = status
        member.words = words
        return member

    COMPLETE = 0, "the stream is complete (of stop: it is stopped, or was over before)"
    FAILED = 1, "the generation failed, or the server refused the request"
    USAGE = 2, "wrong usage"
    GONE = 3, "no such stream (any more), or not the bytes that were asked for"
    CANCELLED = 4, "it was stopped, or replaced by a newer one"
    UNREACHABLE = 5, "the server cannot be reached, or stayed away too long"
    # As sysexits.h has it: EX_IOERR.
    UNWRITABLE = 74, "the output cannot be written; the generation goes on"
    # As shells have it: 128 + SIGINT, 128 + SIGPIPE.
    DETACHED = 130, "detached by Ctrl-C; the generation goes on"
    PIPE_CLOSED = 141, "detached because nobody reads the output; the generation goes on"


STATUS_HELP = "\b\nExit status:\n" + "".join(
    f"  {status.value:<3}  {status.words}\n" for status in ExitStatus
)


class CommandFailedError(Exception):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, status: ExitStatus) -> None:
        super().__init__(message)
        self.status = status


def run(work: Coroutine[Any, Any, ExitStatus], on_interrupt: Callable[[], None]) -> NoReturn:
    """Run to an exit status; a client's errors become one line."""
    try:
        status = asyncio.run(work)
    except KeyboardInterrupt:
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # behind the terminal's ^C
        on_interrupt()
        status = ExitStatus.DETACHED
    except BrokenPipeError:
        _discard_output()
        status = ExitStatus.PIPE_CLOSED
    except OSError as error:  # of the output: the network's are ClientErrors
        click.echo(f"Error: the output cannot be written: {error.strerror}", err=True)
        on_interrupt()
        _discard_output()
        status = ExitStatus.UNWRITABLE
    except (ClientError, CommandFailedError) as error:
        failure = _explained(error) if isinstance(error, ClientError) else error
        click.echo(f"Error: {clean(str(failure))}", err=True)
        status = failure.status
    sys.exit(status)


def _discard_output() -> None:
    """What is still to be written goes nowhere, or Python would complain about it on leaving."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())


def _explained(error: ClientError) -> CommandFailedError:
    match error:
        case OffsetLostError():
            message = (
                "the bytes from there on are no longer kept;"
                f" --from earliest begins at byte {error.first_offset}"
            )
            return CommandFailedError(message, ExitStatus.GONE)
        case GoneError():
            message = (
                "there is no such stream: it never was, has expired, was stopped,"
                " or the server was started anew"
            )
            return CommandFailedError(message, ExitStatus.GONE)
        case ReplacedError():
            message = "the stream was replaced by a newer one"
            return CommandFailedError(message, ExitStatus.CANCELLED)
        case ActiveError():
            message = "this conversation is being answered: attach to it, stop it, or take another"
            return CommandFailedError(message, ExitStatus.FAILED)
        case UnreachableError(first_contact=True):
            return CommandFailedError(f"cannot connect to {error}", ExitStatus.UNREACHABLE)
        case UnreachableError() | UnavailableError() | NotPyserveError():
            return CommandFailedError(str(error), ExitStatus.UNREACHABLE)
        case AnswerError(reason="invalid_offset" | "offset_ahead" | "invalid_conversation_id"):
            return CommandFailedError(str(error), ExitStatus.USAGE)
    return CommandFailedError(str(error), ExitStatus.FAILED)
