"""The log of a session once more, slow and obvious, over plain bytes. Shares no code with csrc/."""

from __future__ import annotations

import bisect
import re

HEARTBEAT = b": ping\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLarge(Exception):  # noqa: N818
    """The block cannot become an event of this log."""


class FramerModel:
    """SSE text in any split, whole events out."""

    def __init__(self, epoch: str, max_event_bytes: int) -> None:
        self._epoch = epoch.encode()
        self._max_event_bytes = max_event_bytes
        self._line = b""
        self._skip_lf = False
        self._first_line = True
        self._first_event = True
        self.discard()

    def discard(self) -> None:
        self._block = b""
        self._has_data = False
        self._line = b""

    @property
    def pending_bytes(self) -> int:
        return len(self._block) + len(self._line)

    def feed(self, text: bytes) -> list[bytes]:
        """The blocks that `text` completes: their lines, without the fields that are ours."""
        if not text:
            return []
        if self._skip_lf and text.startswith(b"\n"):
            text = text[1:]
        self._skip_lf = text.endswith(b"\r")
        *lines, self._line = re.split(rb"\r\n|\r|\n", self._line + text)
        rest, self._line = self._line, b""
        blocks = [block for line in lines if (block := self._end_line(line))]
        self._line = rest
        if rest:  # a line end is counted with what follows it
            self._check_size(self.pending_bytes)
        return blocks

    def finish(self) -> bytes | None:
        """The block that only lacks its blank line, if its last line is complete."""
        block = self._block if self._has_data and not self._line else None
        self.discard()
        return block

    def event(self, block: bytes, offset: int) -> bytes:
        """The block as it stands at `offset` of the log, with its id."""
        head = block + (b"retry: 1000\n" if self._first_event else b"")
        head += b"id: " + self._epoch + b"-"
        digits = 1
        while len(str(end := offset + len(head) + digits + 2)) != digits:
            digits += 1
        event = head + b"%d\n\n" % end
        self._check_size(len(event))
        self._first_event = False
        return event

    def _end_line(self, line: bytes) -> bytes | None:
        self._check_size(len(self._block) + len(line))
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            block = self._block if self._has_data else None
            self.discard()
            return block
        field = line.partition(b":")[0]
        if field not in (b"id", b"retry"):
            self._block += line + b"\n"
            self._has_data = self._has_data or field == b"data"
        return None

    def _check_size(self, size: int) -> None:
        if size > self._max_event_bytes:
            raise EventTooLarge


class LogModel:
    """The bytes of a session, and from where on they are kept."""

    def __init__(self, epoch: str, max_session_bytes: int) -> None:
        self.framer = FramerModel(epoch, max_session_bytes)
        self._max_session_bytes = max_session_bytes
        self.bytes = b""
        self.first_offset = 0
        self.borders = [0]  # where an event or a heartbeat begins, or the next one will
        self.last_event = (0, 0)

    @property
    def end_offset(self) -> int:
        return len(self.bytes)

    def append(self, text: bytes) -> bool:
        """True when an event was published. Raises EventTooLarge after what came before it."""
        end_before = self.end_offset
        # Line by line, so that what comes before too large an event is published.
        try:
            for line in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text):
                for block in self.framer.feed(line):
                    self._publish(block)
        except EventTooLarge:
            self.framer.discard()
            raise
        finally:
            self._enforce_cap()
        return self.end_offset > end_before

    def end_input(self) -> bool:
        """True when an event was published. Raises EventTooLarge."""
        block = self.framer.finish()
        if block is not None:
            self._publish(block)
        return block is not None

    def heartbeat(self) -> None:
        self._append_between_events(HEARTBEAT)

    def end(self, line: bytes) -> None:
        self.framer.discard()
        self.bytes += line
        self._enforce_cap()

    def drop_to(self, offset: int) -> None:
        """What the memory budget took. Only whole events may go."""
        assert self.first_offset <= offset <= self.end_offset
        assert offset in self.borders
        self.first_offset = offset

    def _publish(self, block: bytes) -> None:
        start = self.end_offset
        event = self.framer.event(block, start)
        # A comment that an upstream put first cannot be told from a heartbeat.
        while event.startswith(HEARTBEAT):
            event = event.removeprefix(HEARTBEAT)
            self.bytes += HEARTBEAT
            self.borders.append(self.end_offset)
        self._append_between_events(event)
        self.last_event = (start, self.end_offset)

    def _append_between_events(self, text: bytes) -> None:
        self.bytes += text
        self.borders.append(self.end_offset)
        self._enforce_cap()

    def _enforce_cap(self) -> None:
        held = self.end_offset - self.first_offset + self.framer.pending_bytes
        least = self.first_offset + held - self._max_session_bytes
        if least > self.first_offset:
            border = bisect.bisect_left(self.borders, least)
            # The last line of a log is no event: it stays.
            self.first_offset = self.borders[min(border, len(self.borders) - 1)]
