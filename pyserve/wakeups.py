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
        self.wakeup = _core.Wakeup()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        loop.add_reader(self.wakeup.fd, self._on_ready)

    def _on_ready(self) -> None:
        for token in self.wakeup.drain():
            future = self._waiting.pop(token, None)
            if future is not None and not future.done():
                future.set_result(None)

    def expect(self) -> tuple[int, asyncio.Future[None]]:
        """A token, and the future that is done when the core notifies the wake-up with it."""
        token = next(self._tokens)
        future = self._waiting[token] = asyncio.get_running_loop().create_future()
        return token, future

    def forget(self, token: int) -> None:
        """The token will not come, or matters to nobody."""
        self._waiting.pop(token, None)

    async def wait_readable(self, reader: _core.SessionReader) -> None:
        """Return when `reader` has news: bytes, the end, or a loss."""
        token, future = self.expect()
        if not reader.notify_when_readable(self.wakeup, token):
            self.forget(token)
            return
        try:
            await future
        except BaseException:
            reader.forget(self.wakeup, token)
            self.forget(token)
            raise


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
