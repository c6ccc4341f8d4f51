"""A TCP proxy that breaks connections where it is told to."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cut:
    """Ends one connection: `after` so many bytes of an answer's body (its chunk sizes included), or
    behind the first place where these bytes have passed; by FIN, by RST, or by saying no more."""

    after: int | bytes
    how: Literal["close", "reset", "stall"] = "reset"

    def share(self, head_end: int, passed: bytes) -> int | None:
        """How many of the bytes that came may pass; None for all."""
        if isinstance(self.after, bytes):
            at = passed.find(self.after)
            return None if at < 0 else at + len(self.after)
        allowed = head_end + self.after
        return allowed if len(passed) >= allowed else None


class CuttingProxy:
    """What :func:`cutting_proxy` yields. ``cuts`` holds those for the next connections, in turn."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.cuts: deque[Cut] = deque()
        #: the first line of every request
        self.requests: list[str] = []
        self._server: asyncio.Server | None = None
        self._port = 0
        self._relays: set[asyncio.Task[None]] = set()
        self._muted: set[asyncio.Task[None]] = set()
        self._asked: dict[asyncio.Task[None], str] = {}  # by connection: its last request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def positions(self) -> list[str]:
        """The ``from`` of every request that had one."""
        return re.findall(r"from=([^& ]*)", "\n".join(self.requests))

    async def listen(self) -> None:
        """Take connections (again)."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Break every connection, and refuse new ones until :meth:`listen`."""
        assert self._server is not None
        self._server.close()
        for relay in list(self._relays):
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)
        await self._server.wait_closed()

    async def break_all(self) -> None:
        """Break every connection; new ones are taken."""
        for relay in list(self._relays):
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    def mute(self, words: str) -> None:
        """Let nothing more pass on connections whose last request's first line holds these."""
        muted = [relay for relay, line in self._asked.items() if words in line]
        assert muted, self.requests
        self._muted.update(muted)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.create_task(self._relay(reader, writer))
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)
        relay.add_done_callback(self._muted.discard)
        relay.add_done_callback(lambda _: self._asked.pop(relay, None))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        cut = self.cuts.popleft() if self.cuts else None
        there = None
        try:
            there, upstream = await asyncio.open_connection(*self.target)
            asking = asyncio.create_task(self._ask(relay, reader, upstream))
            try:
                await self._answer(there, writer, cut)
                if cut is not None and cut.how == "stall":
                    await asking
            finally:
                asking.cancel()
                upstream.close()
        except OSError:
            reset(writer)
        except asyncio.CancelledError:
            reset(writer)
            raise
        finally:
            writer.close()

    async def _ask(
        self,
        relay: asyncio.Task[None],
        reader: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError):
            while block := await reader.read(65536):
                if re.match(rb"[A-Z]+ /", block):
                    self.requests.append(block.partition(b"\r\n")[0].decode())
                    self._asked[relay] = self.requests[-1]
                upstream.write(block)
        upstream.close()

    async def _answer(
        self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Cut | None
    ) -> None:
        passed = b""
        while block := await there.read(65536):
            if asyncio.current_task() in self._muted:
                continue
            before = len(passed)
            passed += block
            head_end = passed.find(b"\r\n\r\n") + 4
            share = cut.share(head_end, passed) if cut is not None and head_end > 3 else None
            writer.write(block if share is None else block[: max(0, share - before)])
            await writer.drain()
            if share is not None:
                if cut is not None and cut.how == "reset":
                    await flushed(writer)
                    reset(writer)
                return


async def flushed(writer: asyncio.StreamWriter) -> None:
    """A RST would take along what still waits to be sent."""
    while writer.transport.get_write_buffer_size():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if not writer.transport.is_closing():
        linger_for_0_s = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_for_0_s)
    writer.transport.abort()


@asynccontextmanager
async def cutting_proxy(target: tuple[str, int]) -> AsyncIterator[CuttingProxy]:
    """Listen on a free port for connections to `target`."""
    proxy = CuttingProxy(target)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.refuse()
