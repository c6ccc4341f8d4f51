"""Continuous batching for models that live in Python.

A model that advances sixteen sequences in one call is hardly slower than for one. So the requests
that run at a time share their steps: they join between two steps and leave between two steps, and
nobody waits for another one's end while there is room.

::

    generate() ──> waiting ──join──> running ──step──> running ──finish_reason, leave──> gone
    loop           in order          on the worker thread, at most max_batch_size

All of the model runs on one worker thread. A step that keeps the GIL holds up the event loop as
well; numpy and torch let it go while they calculate.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pyserve.errors import ApiError, ConfigError

log = logging.getLogger("pyserve")

_RequestT = TypeVar("_RequestT")
_ModelRequestT = TypeVar("_ModelRequestT", contravariant=True)
_StateT = TypeVar("_StateT")


@dataclass(frozen=True, slots=True)
class Token:
    """What one step gives one sequence: some text, which may be empty, and at the end the reason.

    ``finish_reason`` is ``stop`` or ``length``, as OpenAI has them; None while there is more.
    """

    text: str
    finish_reason: str | None = None


class BatchModel(Protocol[_ModelRequestT, _StateT]):
    """A model that advances many sequences in one call. Only the worker thread calls it."""

    def start(self, request: _ModelRequestT) -> _StateT:
        """Make a request's state: read its prompt, for example.

        An :class:`ApiError` that is raised here is told to the request's client as it is; any other
        exception as ``generation_failed``.
        """

    def step(self, states: Sequence[_StateT]) -> Sequence[Token]:
        """One token for each of the states, in their order. A token with a ``finish_reason`` is
        its sequence's last. Who is missing in the next call has left, and its state is let go.

        An exception fails all of the states' requests, and no others.
        """


class _Sequence(Generic[_RequestT]):
    """A request on its way from the loop's thread, and its news on their way back."""

    def __init__(self, request: _RequestT, arrived_at: float) -> None:
        self.request = request
        self.arrived_at = arrived_at
        self.news: asyncio.Queue[Token | ApiError] = asyncio.Queue()
        self.has_left = False


class Batcher(Generic[_RequestT, _StateT]):
    """Runs a :class:`BatchModel` for the requests of one event loop::

        async with Batcher(model, max_batch_size=16, max_batch_wait_ms=5) as batcher:
            async for token in batcher.generate(request):
                print(token.text, end="")

    Requests join in the order in which they came. An idle batch waits for company, at most
    `max_batch_wait_ms` from the arrival of the first; a full one starts at once. How many may wait
    is not limited here: that is the work of the queue in front.
    """

    def __init__(
        self,
        model: BatchModel[_RequestT, _StateT],
        *,
        max_batch_size: int,
        max_batch_wait_ms: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` tells seconds.

        Raises:
            ConfigError: a size below 1 or a wait below 0.
        """
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {max_batch_size}, it must be at least 1")
        if not max_batch_wait_ms >= 0:
            raise ConfigError(f"max_batch_wait_ms is {max_batch_wait_ms}, it must be at least 0")
        self._model = model
        self._max_batch_size = max_batch_size
        self._max_batch_wait_s = max_batch_wait_ms / 1000
        self._clock = clock
        # Under this condition's lock: who waits, and whether anyone may. No call of the model is.
        self._changed = threading.Condition()
        self._waiting: OrderedDict[_Sequence[_RequestT], None] = OrderedDict()
        self._is_open = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        # A model that hangs in a step must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="pyserve batch", daemon=True)

    async def __aenter__(self) -> Batcher[_RequestT, _StateT]:
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._thread.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        """Let the step that runs come to its end, fail what is left with ``shutdown``, and return
        when the thread is gone."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        await self._ended.wait()
        self._thread.join()  # it has said its last word

    async def generate(self, request: _RequestT) -> AsyncGenerator[Token, None]:
        """The tokens of one request, up to the one with a ``finish_reason``.

        It begins to wait for its place when it is iterated first. To leave, cancel the task or
        close the iterator (a ``break`` does so at once only under :func:`contextlib.aclosing`).

        Raises:
            ApiError: the model failed (``generation_failed``, with the model's exception as its
                cause), or raised this itself; ``shutdown``.
        """
        sequence = self._submit(request)
        try:
            while True:
                news = await sequence.news.get()
                if isinstance(news, ApiError):
                    raise news
                yield news
                if news.finish_reason is not None:
                    return
        finally:
            sequence.has_left = True
            with self._changed:
                self._waiting.pop(sequence, None)

    def _submit(self, request: _RequestT) -> _Sequence[_RequestT]:
        if self._loop is None:
            raise RuntimeError("The batcher is not running: async with batcher")
        sequence = _Sequence(request, self._clock())
        with self._changed:
            if not self._is_open:
                raise ApiError("shutdown")
            self._waiting[sequence] = None
            self._changed.notify()
        return sequence

    # From here on: the worker thread. It alone holds the states, so that they go on it, too.

    def _run(self) -> None:
        running: list[tuple[_Sequence[_RequestT], _StateT]] = []
        try:
            while (joining := self._take_waiting(len(running))) is not None:
                running += self._start(joining)
                running = self._without_leavers(self._step(self._without_leavers(running)))
        finally:
            with self._changed:
                self._is_open = False
                left = [*(sequence for sequence, _ in running), *self._waiting]
                self._waiting.clear()
            del running
            self._call_in_loop(_deliver, [(sequence, ApiError("shutdown")) for sequence in left])
            self._call_in_loop(self._ended.set)

    def _take_waiting(self, running_count: int) -> list[_Sequence[_RequestT]] | None:
        """Who joins now, first come, first served; None when the batcher stops.

        Only an idle batch waits here.
        """
        with self._changed:
            while self._is_open:
                wait_s = 0 if running_count else self._company_wait_s()
                if wait_s is None or wait_s > 0:
                    self._changed.wait(wait_s)
                    continue
                count = min(self._max_batch_size - running_count, len(self._waiting))
                return [self._waiting.popitem(last=False)[0] for _ in range(count)]
        return None

    def _company_wait_s(self) -> float | None:
        """How long an idle batch goes on waiting; None for as long as nobody comes."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self._max_batch_size:
            return 0
        first = next(iter(self._waiting))
        return first.arrived_at + self._max_batch_wait_s - self._clock()

    def _start(
        self, joining: Sequence[_Sequence[_RequestT]]
    ) -> Iterator[tuple[_Sequence[_RequestT], _StateT]]:
        """Those that the model could start, with their states."""
        for sequence in joining:
            if sequence.has_left:
                continue
            try:
                state = self._model.start(sequence.request)
            except ApiError as error:
                self._call_in_loop(_deliver, [(sequence, error)])
            except BaseException as error:  # whatever it is, the others are served
                log.exception("the model failed to start a request")
                self._call_in_loop(_deliver, [(sequence, _failure(error))])
            else:
                yield sequence, state

    def _step(
        self, running: list[tuple[_Sequence[_RequestT], _StateT]]
    ) -> list[tuple[_Sequence[_RequestT], _StateT]]:
        """One step for all of them; those who go on."""
        if not running:
            return running
        try:
            tokens = self._model.step([state for _, state in running])
            if len(tokens) != len(running):
                raise ValueError(f"step() gave {len(tokens)} tokens for {len(running)} states")
            is_last = [token.finish_reason is not None for token in tokens]
        except BaseException as error:
            log.exception("the model failed in a step of %d requests", len(running))
            failures = [(sequence, _failure(error)) for sequence, _ in running]
            self._call_in_loop(_deliver, failures)
            return []
        # One call for the step, however many tokens it made: waking the loop is the dear part.
        news = [(sequence, token) for (sequence, _), token in zip(running, tokens, strict=True)]
        self._call_in_loop(_deliver, news)
        return [pair for pair, over in zip(running, is_last, strict=True) if not over]

    @staticmethod
    def _without_leavers(
        running: list[tuple[_Sequence[_RequestT], _StateT]],
    ) -> list[tuple[_Sequence[_RequestT], _StateT]]:
        return [pair for pair in running if not pair[0].has_left]

    def _call_in_loop(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(callback, *args)


def _deliver(
    news: Sequence[tuple[_Sequence[_RequestT], Token | ApiError]],
) -> None:
    for sequence, told in news:
        sequence.news.put_nowait(told)


def _failure(cause: BaseException) -> ApiError:
    """One for each request: a raised exception collects its own traceback."""
    error = ApiError("generation_failed")
    error.__cause__ = cause
    return error
