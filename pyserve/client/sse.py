"""Server-sent events out of bytes as they come: the reading side of WHATWG HTML, section 9.2.6.

Why not a library: a stream's end is told by a comment (``: end completed``), and those at hand,
such as httpx-sse, throw comments away. No I/O here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

_EVENT_ID = re.compile(r"([0-9a-z]{1,13})-([0-9]{1,19})")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a stream."""

    data: str
    event: str = "message"
    #: ``<epoch>-<offset>``: where a reader continues after this event. Empty if it carries none.
    id: str = ""

    @property
    def offset(self) -> int | None:
        """Where this event ends: bytes since the stream's start. None without an event id."""
        match = _EVENT_ID.fullmatch(self.id)
        return int(match[2]) if match else None

    def json(self) -> Any:
        """The data, parsed.

        Raises:
            ValueError: it isn't JSON; ``[DONE]``, for example.
        """
        return orjson.loads(self.data)


@dataclass(frozen=True, slots=True)
class Comment:
    """A line that begins with a colon, without it and the space after it."""

    text: str


class Decoder:
    """Bytes in, split anywhere, also inside a character; events and comments out.

    The cost does not depend on how the bytes are split, and no length is too long.
    """

    def __init__(self) -> None:
        self._line_parts: list[bytes] = []  # the unfinished line
        self._skip_lf = False  # the last line ended with CR: a LF that follows belongs to it
        self._at_start = True  # a byte order mark may stand here
        self._data: list[str] = []
        self._event = ""
        self._id = ""
        self._in_block = False

    @property
    def between_events(self) -> bool:
        """Whether no event and no line has begun and waits for its rest."""
        return not self._in_block and not self._line_parts

    def feed(self, block: bytes) -> list[Event | Comment]:
        """Take the next bytes; returns what they complete."""
        if self._skip_lf and block:
            block = block.removeprefix(b"\n")
            self._skip_lf = False
        if not block:
            return []
        if b"\n" not in block and b"\r" not in block:
            self._line_parts.append(block)
            return []
        text = b"".join((*self._line_parts, block))
        if b"\r" in text:
            self._skip_lf = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._line_parts = [rest] if rest else []
        if self._at_start:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            self._at_start = False
        return [item for line in lines if (item := self._take(line.decode(errors="replace")))]

    def _take(self, line: str) -> Event | Comment | None:
        if not line:
            return self._end_block()
        if line.startswith(":"):
            return Comment(line[1:].removeprefix(" "))
        self._in_block = True
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self._id = value
        return None

    def _end_block(self) -> Event | None:
        """The blank line: an event if there was data. An id stays until the next one."""
        event = None
        if self._data:
            event = Event("\n".join(self._data), self._event or "message", self._id)
        self._data = []
        self._event = ""
        self._in_block = False
        return event
