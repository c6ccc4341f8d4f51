"""How the core wakes asyncio readers: one file descriptor for each event loop."""

from __future__ import annotations

import asyncio
import itertools
import weakref

from pyserve import _core


class LoopWaker:
    """Turns the tokens of a :class:`_core.Wakeup` into futures of one event loop.

    However many readers of the loop have news, its selector wakes once for all of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wakeup = _core.Wakeup()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        loop.add_reader(self._wakeup.fd, self._on_ready)

    def _on_ready(self) -> None:
        for token in self._wakeup.drain():
            future = self._waiting.get(token)
            if future is not None and not future.done():
                future.set_result(None)

    async def wait_readable(self, reader: _core.SessionReader) -> None:
        """Return when `reader` has news: bytes, the end, or a loss."""
        token = next(self._tokens)
        if not reader.notify_when_readable(self._wakeup, token):
            return
        future = self._waiting[token] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            del self._waiting[token]
            if not future.done() or future.cancelled():
                reader.forget(self._wakeup, token)


_wakers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker] = (
    weakref.WeakKeyDictionary()
)


def running_loop_waker() -> LoopWaker:
    """The waker of the running loop, made at its first use. It goes when the loop goes."""
    loop = asyncio.get_running_loop()
    waker = _wakers.get(loop)
    if waker is None:
        waker = _wakers[loop] = LoopWaker(loop)
    return waker
