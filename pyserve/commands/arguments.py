"""Arguments and options that the commands share, and what may be wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

import click
from click.core import ParameterSource

from pyserve.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"

_LEADING_URL = "pyserve.leading_url"


class _Utf8(click.ParamType[str]):
    """Text that can be sent: a command line may hold any bytes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.fail(f"it is not UTF-8, at character {error.start + 1}.", param, ctx)
        return text


class _Key(click.ParamType[str]):
    """What fits into a header. The message does not repeat a secret."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        key = str(value)
        if not (key.isascii() and key.isprintable()) or " " in key:
            self.fail("a key is printable ASCII without spaces.", param, ctx)
        return key


UTF8 = _Utf8()

_OPTIONS = [
    click.option(
        "--url",
        type=UTF8,
        envvar="PYSERVE_URL",
        show_envvar=True,
        default=DEFAULT_URL,
        show_default=True,
        help="The server's URL, where it doesn't stand in front.",
    ),
    click.option(
        "--api-key",
        type=_Key(),
        metavar="KEY",
        envvar="PYSERVE_API_KEY",
        show_envvar=True,
        help="Sent as Authorization: Bearer.",
    ),
    click.option(
        "--give-up-after",
        metavar="SECONDS",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        help="How long to go on trying when the connection is lost.",
    ),
]


def about(what: str) -> Callable[[Any], Any]:
    """``[URL] WHAT``, as the parameter `word`, and the options that :func:`make_client` takes."""

    def split(context: click.Context, _param: click.Parameter, words: tuple[str, ...]) -> str:
        *urls, word = words
        if len(urls) > 1:
            raise click.UsageError(f"Too many arguments: [URL] {what} is all. Quote a text.")
        if urls and not urls[0].startswith(("http://", "https://")):
            raise click.UsageError(f"{urls[0]!r} is not an http:// or https:// URL.")
        context.meta[_LEADING_URL] = urls[0] if urls else None
        return word

    def decorate(command: Any) -> Any:
        for option in reversed(_OPTIONS):
            command = option(command)
        argument = click.argument(
            "word", type=UTF8, nargs=-1, required=True, metavar=f"[URL] {what}", callback=split
        )
        return argument(command)

    return decorate


def make_client(url: str, api_key: str | None, give_up_after: float) -> Client:
    """Of the server that stands in front, or in the option."""
    context = click.get_current_context()
    leading_url = context.meta[_LEADING_URL]
    if leading_url and context.get_parameter_source("url") is ParameterSource.COMMANDLINE:
        raise click.UsageError("The URL is given twice.")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return Client(leading_url or url, headers=headers, give_up_after_s=give_up_after)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error


def read_question(word: str) -> str:
    """The text, which ``-`` takes from stdin."""
    if word != "-":
        return word
    if sys.stdin is None:
        raise click.UsageError("The question comes from stdin, which is closed.")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"The question on stdin is not UTF-8, at byte {error.start + 1}."
        ) from error


def require_stdout() -> TextIO:
    """Where the answer goes."""
    if sys.stdout is None:
        raise click.UsageError("The answer goes to stdout, which is closed.")
    return sys.stdout
