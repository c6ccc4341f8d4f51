"""A running generation: one task that produces into one session, whoever reads it.

Until its ``grace`` is over, a generation that fails before it began is *refused*: it leaves no
session behind, and the POST that asked for it answers with the error. Later the error is told in
the stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyserve.errors import (
    ApiError,
    EventTooLargeError,
    MemoryBudgetError,
    SessionEndedError,
)
from pyserve.sessions import StreamSession, StreamSessionManager

log = logging.getLogger("pyserve")

#: Produces into a session, calls its second argument when the generation has begun, and returns
#: the reason of a completed ending, usually None. Raises ApiError to fail the session.
Produce = Callable[[StreamSession, "Begin"], Awaitable[str | None]]
Begin = Callable[[], None]


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    """Call on the loop's thread: now if that is this one. Whoever ends a session may be on any."""
    if asyncio._get_running_loop() is loop:
        callback(*args)
    elif not loop.is_closed():
        loop.call_soon_threadsafe(callback, *args)


class Generation:
    """One producer at work. Made by :meth:`Generations.start`, in the running loop."""

    def __init__(self, grace_until: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.session: StreamSession
        self.refused: ApiError | None = None
        self._grace_until = grace_until
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    def launch(self, produce: Produce) -> None:
        """Start the task; the session has been made."""
        self._task = asyncio.create_task(self._run(produce), name=f"generation {self.session!r}")

    def watch_readers(self, abandon_after_s: float, unread_s: Callable[[], float]) -> None:
        """Cancel it, reason ``abandoned``, as soon as nobody has read for this long."""
        left_s = abandon_after_s - unread_s()
        if left_s <= 0:
            self.session.cancel("abandoned")
        else:
            self._watch = self._loop.call_later(
                left_s, self.watch_readers, abandon_after_s, unread_s
            )

    async def _run(self, produce: Produce) -> None:
        try:
            reason = await produce(self.session, self._begin)
            self.session.finalize("completed", reason)
        except SessionEndedError:
            pass  # stopped by a client between two appends
        except (EventTooLargeError, MemoryBudgetError) as error:
            log.warning("%s: %r", error, self.session)  # append() has failed the session
        except asyncio.CancelledError:
            self.session.fail(ApiError("shutdown"))  # without effect where a Stop cancelled us
            raise
        except ApiError as error:
            self._fail(error)
        except Exception:
            log.exception("generation failed: %r", self.session)
            self._fail(ApiError("internal_error"))
        finally:
            self._settled.set()
            self._stop_watching()

    def settle(self) -> None:
        """From now on an error is told in the stream."""
        self._settled.set()

    def _begin(self) -> None:
        self.session.start()
        self.settle()

    def _fail(self, error: ApiError) -> None:
        in_grace = asyncio.get_running_loop().time() < self._grace_until
        if in_grace and not self._settled.is_set():
            self.refused = error
            session = self.session
            session.manager.evict(session.key, owner=session.owner, epoch=session.epoch)
        self.session.fail(error)

    def stop(self) -> None:
        """Stop producing. The session has ended or is about to. Any thread may call it."""
        _call_in(self._loop, self._stop)

    def _stop(self) -> None:
        self._settled.set()
        self._stop_watching()
        if self._task is not None:
            self._task.cancel()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def wait_settled(self) -> None:
        """Wait until it has begun, failed or was stopped, at most until its grace is over.

        Raises:
            ApiError: it was refused, replaced, or cancelled before it began.
        """
        try:
            async with asyncio.timeout_at(self._grace_until):
                await self._settled.wait()
        except TimeoutError:
            return
        if self.refused is not None:
            raise self.refused
        ended = self.session.snapshot()
        if ended.state == "cancelled" and ended.last_event_end == 0:
            raise ApiError("replaced" if ended.reason == "replaced" else "cancelled")


def _unread_s_of(*logs: StreamSession | None) -> Callable[[], float]:
    there = [log for log in logs if log is not None]
    return lambda: min(log.snapshot().unread_s for log in there)


class Generations:
    """The generations that run now, so that they can be waited for and stopped."""

    def __init__(self, manager: StreamSessionManager) -> None:
        self._manager = manager
        self._running: dict[StreamSession, Generation] = {}
        self._passing = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def start(
        self,
        conversation_id: str,
        produce: Produce,
        *,
        owner: str,
        dialect: str,
        tag: bytes,
        grace_until: float,
        subkey: str = "",
        on_end: Callable[[StreamSession], Any] = lambda _session: None,
        abandon_after_s: float | None = None,
        also_read: StreamSession | None = None,
    ) -> Generation:
        """Make the session and start to produce into it.

        `grace_until` is a time of the running loop's clock. `abandon_after_s` is by default the
        manager's, and 0 is never; who reads `also_read` reads this generation, too. `on_end` is
        called on the thread that ends the session.

        Raises:
            ApiError: as ``create_or_replace``; ``memory_budget``.
        """
        generation = Generation(grace_until)
        loop = asyncio.get_running_loop()

        def end(session: StreamSession) -> None:
            try:
                on_end(session)
            finally:
                _call_in(loop, self._forget, session)

        try:
            generation.session = self._manager.create_or_replace(
                conversation_id,
                owner=owner,
                subkey=subkey,
                on_cancel=generation.stop,
                on_end=end,
                dialect=dialect,
                tag=tag,
            )
        except MemoryBudgetError as error:
            raise ApiError("memory_budget", retry_after_s=1) from error
        self._running[generation.session] = generation
        self._idle.clear()
        generation.launch(produce)
        if abandon_after_s is None:
            abandon_after_s = self._manager.config.abandon_after_s
        if abandon_after_s:
            generation.watch_readers(abandon_after_s, _unread_s_of(generation.session, also_read))
        if not generation.session.is_live:  # stopped while it was made
            generation.stop()
            self._forget(generation.session)
        return generation

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Count what the with-block does as a generation too: one that keeps no session."""
        self._passing += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._passing -= 1
            self._tell_if_idle()

    def _forget(self, session: StreamSession) -> None:
        self._running.pop(session, None)
        self._tell_if_idle()

    def _tell_if_idle(self) -> None:
        if not self._running and not self._passing:
            self._idle.set()

    def get(self, session: StreamSession) -> Generation | None:
        """The generation that produces into `session`, None when it is over."""
        return self._running.get(session)

    async def wait_idle(self) -> None:
        """Wait until no generation runs."""
        await self._idle.wait()

    def fail_all(self, error: ApiError) -> None:
        """End every running generation with `error`, each in its own dialect."""
        for session, generation in list(self._running.items()):
            session.fail(error)
            generation.stop()
