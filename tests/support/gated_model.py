"""A model for the batcher that takes a step only when the test lets it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from pyserve.producers.batch import Batcher, Token

LIMIT_S = 30.0  # never waited for


class State:
    """A sequence of the gated model: says its name so many times."""

    def __init__(self, name: str, length: int) -> None:
        self.name = name
        self.left = length


class GatedModel:
    """A request is a name and a length. Each step waits to be let through."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._entered: asyncio.Queue[list[str]] = asyncio.Queue()
        self._gate = threading.Semaphore(0)
        self.started: list[str] = []
        self.start_error: BaseException | None = None
        self.step_error: BaseException | None = None
        self.extra_tokens: list[Token] = []
        self.on_state: Callable[[State], object] = id

    def start(self, request: tuple[str, int]) -> State:
        self.started.append(request[0])
        if self.start_error is not None:
            error, self.start_error = self.start_error, None
            raise error
        state = State(*request)
        self.on_state(state)
        return state

    def step(self, states: Sequence[State]) -> list[Token]:
        self._loop.call_soon_threadsafe(self._entered.put_nowait, [s.name for s in states])
        assert self._gate.acquire(timeout=LIMIT_S)
        if self.step_error is not None:
            error, self.step_error = self.step_error, None
            raise error
        for state in states:
            state.left -= 1
        return [Token(s.name, None if s.left else "stop") for s in states] + self.extra_tokens

    async def entered(self) -> list[str]:
        """Wait until it is in its next step; whose step that is."""
        return await self._entered.get()

    def open(self, steps: int = 1) -> None:
        """Let it through so many steps."""
        self._gate.release(steps)

    def open_for_good(self) -> None:
        self._gate.release(10_000)


@asynccontextmanager
async def batching(
    model: GatedModel, size: int = 4, wait_ms: float = 0
) -> AsyncIterator[Batcher[tuple[str, int], State]]:
    async with Batcher(model, max_batch_size=size, max_batch_wait_ms=wait_ms) as batcher:
        try:
            yield batcher
        finally:
            model.open_for_good()


async def text_of(batcher: Batcher[tuple[str, int], State], name: str, length: int) -> str:
    async with aclosing(batcher.generate((name, length))) as tokens:
        return "".join([token.text async for token in tokens])


async def ask(
    batcher: Batcher[tuple[str, int], State], name: str, length: int = 1
) -> asyncio.Task[str]:
    """A request that waits for its place when this returns."""
    task = asyncio.create_task(text_of(batcher, name, length))
    await asyncio.sleep(0)  # the task runs up to its first wait
    return task
