"""The end of a body reaches the client whole, or the connection is reset: never cut and closed."""

import asyncio

import pytest
from fake_upstream import DONE, RESET, SSE_HEAD, STALL, FakeUpstream, chunk, token
from serving import Connection, Serve, Server, request_bytes, texts_of, until

import pyserve.app

pytestmark = pytest.mark.usefixtures("delivery_path")

EVENT = "x" * 1000


def finished(server: Server, log_bytes: int) -> None:
    session = server.manager.create_or_replace("c")
    while session.total_size < log_bytes:
        session.append_event(EVENT)
    session.finalize()


async def stalled(server: Server, version: str) -> Connection:
    """A client that reads the head of its answer and nothing more."""
    connection = await server.connect(receive_buffer_bytes=4096)
    await connection.send(request_bytes("GET", "/v1/stream/c", version=version))
    await until(lambda: server.session("c").snapshot().readers == 1)
    return connection


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("log_bytes", [300_000, 340_000, 500_000])
async def test_who_has_not_taken_all_at_a_shutdown_is_reset(
    server: Server, monkeypatch: pytest.MonkeyPatch, version: str, log_bytes: int
) -> None:
    monkeypatch.setattr(pyserve.app, "SHUTDOWN_DRAIN_S", 0.2)
    finished(server, log_bytes)
    connection = await stalled(server, version)
    await server.runner.cleanup()
    while await connection.fill():
        pass
    # What the kernel took before the end it still delivers.
    whole = connection.buffer.endswith((b": end completed\n", b"0\r\n\r\n"))
    assert whole or connection.end == "reset"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_who_takes_nothing_of_a_finished_stream_is_reset(serve: Serve, version: str) -> None:
    server = await serve(write_timeout_s=0.2)
    finished(server, 600_000)
    connection = await stalled(server, version)
    await until(lambda: server.session("c").snapshot().readers == 0)
    while await connection.fill():
        connection.take()
    assert connection.end == "reset"


async def test_who_takes_little_at_a_time_is_not_disconnected(serve: Serve) -> None:
    server = await serve(write_timeout_s=0.6)
    finished(server, 3_000_000)
    connection = await server.connect(receive_buffer_bytes=32 * 1024)
    await connection.send(request_bytes("GET", "/v1/stream/c"))
    response = await connection.response()
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 1.5  # more than twice what a client may take nothing for
    while loop.time() < until_s:
        size = len(response.body)
        while len(response.body) < size + 32 * 1024:  # what its own kernel held is no progress
            await response.read_more()
        await asyncio.sleep(0.05)  # so that something is always unsent
    assert response.end is None
    await response.read_to_end()
    assert response.end == "clean"
    assert response.body.endswith(b": end completed\n")


@pytest.mark.parametrize("after", [RESET, STALL])
async def test_what_an_upstream_does_after_its_terminator_is_no_failure(
    serve: Serve, upstream: FakeUpstream, after: str
) -> None:
    server = await serve(upstream_idle_timeout_s=0.1)
    upstream.play((SSE_HEAD, chunk(token("a") + DONE), after))
    response = await server.post("c")
    await response.read_to_end()
    assert texts_of(response.body) == ["a", "[DONE]"]
    assert response.body.endswith(b"\n\n: end completed\n")
    assert server.session("c").state == "completed"
