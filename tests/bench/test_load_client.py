"""The bench's load client misses no wrong byte: its figures are worth that much."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EVENTS = 5
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"

_spec = importlib.util.spec_from_file_location("bench_events", ROOT / "bench" / "events.py")
assert _spec
assert _spec.loader
events = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(events)

LOG: bytes = events.make_log(EVENTS)


def chunked(body: bytes, size: int) -> bytes:
    """`body` in chunks of `size` bytes."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


async def read(programs: Path, answer: bytes, *options: str) -> dict[str, Any]:
    """What the load client says about this answer."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = await asyncio.create_subprocess_exec(
            programs / "load_client",
            *("--port", str(port), "--get", "/", "--events", str(EVENTS), "--timeout", "10"),
            *options,
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await client.communicate()
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert (client.returncode == 0) == (found["errors"] == [])
    return found


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
async def test_a_log_is_accepted_wherever_its_chunks_are_cut(programs: Path, size: int) -> None:
    found = await read(programs, chunked(LOG, size))
    assert found["errors"] == []
    assert found["events"] == EVENTS
    assert found["body_bytes"] == len(LOG)


async def test_a_body_with_a_length_is_accepted(programs: Path) -> None:
    found = await read(programs, HEAD + b"Content-Length: %d\r\n\r\n" % len(LOG) + LOG)
    assert found["errors"] == []


async def test_heartbeats_count_as_bytes_of_the_log(programs: Path) -> None:
    log = b"retry: 1000\n" + events.with_id(events.make_event(0), b"e", 12)
    log += b": ping\n"
    for seq in range(1, EVENTS):
        log += events.with_id(events.make_event(seq), b"e", len(log))
    log += events.DONE
    assert (await read(programs, chunked(log, 64)))["errors"] == []


def without_one(log: bytes) -> bytes:
    blocks = log.split(b"\n\n")
    return b"\n\n".join(blocks[:2] + blocks[3:])


def doubled(log: bytes) -> bytes:
    blocks = log.split(b"\n\n")
    return b"\n\n".join(blocks[:2] + blocks[1:])


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "a byte of an event": lambda log: log.replace(b'"content":" token"', b'"content":" tokem"', 1),
    "a byte of the padding": lambda log: re.sub(rb'("pad":"...)(.)', rb"\1_", log, count=1),
    "an event is missing": without_one,
    "an event comes twice": doubled,
    "the last event is missing": lambda log: log.replace(b"data: [DONE]", b": done"),
    "an id is off by one": lambda log: log.replace(b"\n\ndata", b"\n\n\ndata", 1),
    "a line that is nobody's": lambda log: log.replace(b"\n\ndata", b"\n\nnoise\ndata", 1),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_log_is_an_error(programs: Path, wrong: str) -> None:
    changed = WRONG[wrong](LOG)
    assert changed != LOG
    assert (await read(programs, chunked(changed, 64)))["errors"]


async def test_a_connection_that_ends_early_is_an_error(programs: Path) -> None:
    found = await read(programs, chunked(LOG, 64).removesuffix(b"0\r\n\r\n"))
    assert found["errors"] == ["reader 0: closed before the end of the body"]


async def test_another_status_is_an_error(programs: Path) -> None:
    found = await read(programs, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    assert found["errors"] == ["reader 0: status 404"]


async def test_readers_of_a_foreign_stream_must_get_the_same(programs: Path) -> None:
    answers = iter([chunked(b"data: a\n\n", 4), chunked(b"data: b\n\n", 4)])

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(next(answers))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = await asyncio.create_subprocess_exec(
            programs / "load_client",
            *("--port", str(port), "--get", "/", "--readers", "2", "--foreign"),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await client.communicate()
    assert "got other bytes" in json.loads(output.splitlines()[-1])["errors"][0]
