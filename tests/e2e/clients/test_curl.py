"""curl reads a stream, with no more than its own options and a line of shell."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from cutting_proxy import Cut, CuttingProxy
from gate import Gate
from llama import chat
from needs import needs

if TYPE_CHECKING:
    from conftest import Generation

pytestmark = [pytest.mark.asyncio(loop_scope="module"), needs("curl")]


async def run(*command: str | Path, **env: str) -> bytes:
    """Its output; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=asyncio.subprocess.PIPE, env={**os.environ, **env}
    )
    try:
        async with asyncio.timeout(20):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0
    return output


# The bytes that are here say where to go on: what is read is the log, to the byte.
README = Path(__file__).parents[3] / "README.md"
READ_ON = README.read_text().partition("```sh\ntouch log")[2].partition("```")[0]


async def test_a_loop_over_its_own_file_reads_the_log_to_the_byte_through_cuts(
    tmp_path: Path, gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    gated.hold(after_events=30)
    wire.cuts += [Cut(after=3001), Cut(after=3002, how="close"), Cut(after=0)]
    await generation.start()
    (tmp_path / "log").touch()
    assert "until curl" in READ_ON
    script = f"cd {tmp_path}; : {READ_ON}"
    async with asyncio.TaskGroup() as group:
        group.create_task(run("sh", "-c", script, URL=wire.url + generation.path()))
        group.create_task(gated.open())
    assert (tmp_path / "log").read_bytes() == await generation.log()
    assert len(wire.requests) == 4


async def test_retry_starts_its_file_anew_and_has_it_whole(
    tmp_path: Path, wire: CuttingProxy, generation: Generation
) -> None:
    await generation.start()
    wire.cuts.append(Cut(after=5000))
    retry = ("--retry", "3", "--retry-all-errors", "--retry-delay", "1")
    await run("curl", "-s", *retry, "-o", tmp_path / "log", wire.url + generation.path())
    assert (tmp_path / "log").read_bytes() == await generation.log()
    assert len(wire.requests) == 2


async def test_retry_waits_as_long_as_a_loading_model_says(
    gated: Gate, wire: CuttingProxy, generation: Generation
) -> None:
    loading = {"error": {"code": 503, "type": "unavailable_error", "message": "Loading model"}}
    gated.refusals.append(web.json_response(loading, status=503))
    output = await run(
        *("curl", "-sN", "--retry", "3", f"{wire.url}/v1/chat/completions"),
        *("-H", f"X-Conversation-Id: {generation.id}"),
        *("-d", json.dumps(chat(50))),
    )
    # To a pipe it writes the refusal, too, unless it is told to -f.
    assert output.endswith(await generation.log())
    assert gated.generations == 2


async def test_the_header_last_event_id_reads_on_and_gets_204_at_the_end(
    wire: CuttingProxy, generation: Generation
) -> None:
    await generation.start()
    log = await generation.log()
    events = await generation.events()

    async def read_behind(event_id: str) -> bytes:
        header = f"Last-Event-ID: {event_id}"
        url = wire.url + generation.path()
        return await run("curl", "-s", "-w", "%{http_code}", "-H", header, url)

    middle, last = events[len(events) // 2], events[-1]
    assert await read_behind(f"{middle.epoch}-{middle.end}") == log[middle.end :] + b"200"
    assert await read_behind(f"{last.epoch}-{last.end}") == b"204"
