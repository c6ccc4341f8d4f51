"""What a person sees: text on stdout as it comes, what else there is to say on stderr."""

from __future__ import annotations

import io
import re
import shlex
from typing import TextIO

import click

from pyserve.client import ByteStream, Client, Connection, EventStream, Gap
from pyserve.client.deltas import Delta

# What could move the cursor, or worse, when a model writes it to a terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Without what a terminal would take for an order."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def say(text: str) -> None:
    """A line on stderr."""
    click.echo(f"pyserve: {clean(text)}", err=True)


def say_how_to_attach(client: Client, stream: EventStream | ByteStream, options: str = "") -> None:
    """For who left early."""
    words = ["--" if stream.conversation_id.startswith("-") else "", client.base_url]
    at = f"--from {stream.position}" if stream.position else ""
    command = ["pyserve attach", options, at, *words, shlex.quote(stream.conversation_id)]
    if stream.epoch is not None:
        say("detached; the generation goes on. Attach again with:")
    else:
        say("interrupted before the server answered. If the generation has begun, attach with:")
    click.echo(f"  {' '.join(filter(None, command))}", err=True)


class Screen:
    """A stream's text, on a terminal or in a file."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")
        self._is_terminal = out.isatty()
        self._held_back = ""
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
            text = clean(self._join_line_ends(text))
        self._at_line_start = text.endswith("\n")
        self._out.write(click.style(text, dim=True) if dim else text)

    def _join_line_ends(self, text: str) -> str:
        """CRLF is a line end, also where a token ends between the two."""
        text = self._held_back + text
        self._held_back = "\r" if text.endswith("\r") else ""
        return text.removesuffix("\r").replace("\r\n", "\n")

    def end_line(self) -> None:
        """On a terminal, what follows stands on a line of its own."""
        if self._is_terminal and not self._at_line_start:
            self._out.write("\n")
            self._at_line_start = True
        self._out.flush()

    def on_connection(self, news: Connection) -> None:
        """Say when the connection is lost, once, and when it is back."""
        if news.error is not None:
            if not self._lost:
                self._tell(f"{news.error}; trying again")
            self._lost = True
            return
        if self._lost and self._connected:
            self._tell(f"attached again at byte {news.offset}")
        self._lost = False
        self._connected = True

    def on_gap(self, gap: Gap) -> None:
        """Say what is missing."""
        self._tell(f"[bytes {gap.first} to {gap.end} are no longer kept]")

    def _tell(self, text: str) -> None:
        self.end_line()
        say(text)
