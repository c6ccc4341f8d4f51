"""Clients that follow a stream, each in its own way: none loses or doubles an event, or goes on
asking when all is read. They are the scripts in `follow`, which show how each is used.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cutting_proxy import Cut, CuttingProxy, cutting_proxy
from gate import Gate
from serving import Event

if TYPE_CHECKING:
    from conftest import Generation

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOLLOW = Path(__file__).parent / "follow"

# The scripts' own patience is shorter: who stays silent for so long hangs.
PATIENCE_S = 20.0

HAS_NODE = "CI" in os.environ or bool(
    shutil.which("node") and (FOLLOW.parent / "node_modules").exists()
)
needs_node = pytest.mark.skipif(
    not HAS_NODE, reason="needs Node and its packages: make test-python"
)

Command = list[str | Path]


#: Reconnect by themselves, after a clean end, too, until they are told that it was the last.
EVENT_SOURCES: list[Command] = [
    ["node", FOLLOW / "eventsource.mjs"],
    [sys.executable, FOLLOW / "follow_aiohttp_sse.py", "aiohttp_sse_client"],
    [sys.executable, FOLLOW / "follow_aiohttp_sse.py", "aiohttp_sse_client2"],
]
#: For these a clean end is the end.
READERS: list[Command] = [
    ["node", FOLLOW / "eventsource-parser.mjs"],
    ["node", FOLLOW / "fetch-event-source.mjs"],
    [sys.executable, FOLLOW / "follow_httpx_sse.py"],
]
CLIENTS = [each for each in EVENT_SOURCES + READERS if HAS_NODE or each[0] != "node"]

every_client = pytest.mark.parametrize(
    "client",
    [
        pytest.param(command, marks=needs_node if command[0] == "node" else ())
        for command in EVENT_SOURCES + READERS
    ],
    ids=lambda command: Path(command[-1]).stem,
)


class Follower:
    """A running script."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> dict[str, Any]:
        """What it tells next."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await self._process.stdout.readline()
        assert line, "it ended without a word"
        told: dict[str, Any] = json.loads(line)
        return told

    async def events(self, count: int) -> list[tuple[str, str]]:
        """The next so many, as (id, data)."""
        return [(told["id"], told["data"]) for told in [await self.line() for _ in range(count)]]

    async def rest(self) -> tuple[list[tuple[str, str]], int]:
        """What remains of them, and the status at which it stopped for good."""
        events = []
        while "end" not in (told := await self.line()):
            events.append((told["id"], told["data"]))
        async with asyncio.timeout(PATIENCE_S):
            assert await self._process.wait() == 0
        return events, told["end"]


@asynccontextmanager
async def follow(client: Command, url: str, *options: str) -> AsyncIterator[Follower]:
    process = await asyncio.create_subprocess_exec(
        *(str(word) for word in (*client, url, *options)),
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
    )
    try:
        yield Follower(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def as_told(events: list[Event]) -> list[tuple[str, str]]:
    return [(f"{event.epoch}-{event.end}", event.data) for event in events]


def cut_after(event: Event) -> Cut:
    """The connection is lost behind this one, which arrives."""
    return Cut(after=f"id: {event.epoch}-{event.end}\n\n".encode(), how="close")


@every_client
async def test_it_follows_a_live_stream_and_goes_on_after_a_cut_in_the_middle(
    client: Command, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    gated.hold(after_events=10)
    wire.cuts.append(Cut(after=10_000))
    await generation.start()
    async with follow(client, wire.url + generation.path()) as follower:
        # Only the first ten are made: these come before the generation goes on.
        told = await follower.events(10)
        await gated.open()
        rest, status = await follower.rest()
    assert told + rest == as_told(await generation.events())
    asks_again_after_a_clean_end = client in EVENT_SOURCES
    assert status == (204 if asks_again_after_a_clean_end else 200)
    assert len(wire.requests) == (3 if asks_again_after_a_clean_end else 2)


async def for_each_client(check: Callable[[Command], Awaitable[None]]) -> None:
    """All at once: they wait a second before they ask again."""

    async def named(client: Command) -> None:
        try:
            await check(client)
        except Exception as error:
            error.add_note(f"the client is {client}")
            raise

    async with asyncio.TaskGroup() as group:
        for client in CLIENTS:
            group.create_task(named(client))


async def test_one_that_lost_only_the_end_is_told_that_there_is_nothing_more(
    wire: CuttingProxy, generation: Generation
) -> None:
    await generation.start()
    events = await generation.events()

    async def check(client: Command) -> None:
        async with cutting_proxy(wire.target) as own_wire:
            own_wire.cuts.append(cut_after(events[-1]))
            async with follow(client, own_wire.url + generation.path()) as follower:
                assert await follower.rest() == (as_told(events), 204)
            assert len(own_wire.requests) == 2

    await for_each_client(check)


async def test_one_whose_stream_was_stopped_meanwhile_ends_at_404(
    gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    gated.hold(after_events=10)
    await generation.start()
    left_to_follow = set(map(tuple, CLIENTS))

    async def check(client: Command) -> None:
        async with follow(client, wire.url + generation.path()) as follower:
            assert len(set(await follower.events(10))) == 10
            left_to_follow.remove(tuple(client))
            if not left_to_follow:
                await wire.refuse()
                async with generation.http.delete(generation.server_url + generation.path()):
                    pass
                await wire.listen()
            assert await follower.rest() == ([], 404)

    await for_each_client(check)


@needs_node
async def test_fetch_event_source_with_its_defaults_retries_for_ever_after_a_204(
    wire: CuttingProxy, generation: Generation
) -> None:
    await generation.start()
    events = await generation.events()
    wire.cuts.append(cut_after(events[-1]))
    client: Command = ["node", FOLLOW / "fetch-event-source.mjs"]
    async with follow(client, wire.url + generation.path(), "defaults") as follower:
        await follower.events(len(events))
        assert "retried" in await follower.line()  # the cut
        for _ in range(2):
            told = await follower.line()
            assert "Expected content-type to be text/event-stream" in told["retried"]
