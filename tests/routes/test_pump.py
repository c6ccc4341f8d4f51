"""What goes through the pump and what does not: the bytes are the same, on every kind of loop."""

import asyncio
import gzip
import logging
import os
import resource
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from aiohttp import web
from fake_upstream import DONE, SSE_HEAD, FakeUpstream, chunk, token
from pump_spy import PumpSpy, pump_threads, refuse_hand_overs
from serving import Connection, Serve, Server, log_of, request_bytes, serving, texts_of, until

import pyserve
from pyserve import _core
from pyserve.app import create_app
from pyserve.routes.context import CONTEXT

pytestmark = [
    pytest.mark.skipif(not hasattr(_core, "SocketPump"), reason="there is no pump here"),
    pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"]),
]

READ = "/v1/stream/c"
AT_ONCE_BYTES = 256 * 1024


def long_log(server: Server, size_bytes: int = 600_000) -> pyserve.StreamSession:
    """A finished session that is too long to be written at once."""
    session = server.manager.create_or_replace("c")
    while session.total_size < size_bytes:
        session.append(token("x" * 900))
    session.finalize()
    return session


async def finish_reading(server: Server, connection: Connection, count: int) -> None:
    """Read a live stream on `connection` through the pump, to its end."""
    session = server.manager.create_or_replace("c")
    session.append(token(f"first {count}"))
    await connection.send(request_bytes("GET", READ))
    reading = await connection.response()
    await reading.read_until(b"\n\n")
    session.append(token(f"second {count}"))
    session.finalize()
    assert texts_of(await reading.read_to_end()) == [f"first {count}", f"second {count}"]
    assert reading.end == "clean"


# --- what is handed over


async def test_a_live_streams_post_and_readers_are_the_pumps(
    server: Server, upstream: FakeUpstream, pump: PumpSpy
) -> None:
    step = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(token("a")), step, chunk(token("b") + DONE)))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    reading = await server.open("GET", READ)
    await reading.read_until(b"\n\n")
    assert pump.outcomes == ["running", "running"]
    step.set()
    assert await posted.read_to_end() == await reading.read_to_end()
    assert texts_of(reading.body) == ["a", "b", "[DONE]"]
    assert pump.outcomes == ["end", "end"]


@pytest.mark.parametrize(("left", "pumped"), [(AT_ONCE_BYTES, 0), (AT_ONCE_BYTES + 1, 1)])
async def test_what_is_left_of_a_finished_log_is_pumped_only_if_it_is_long(
    server: Server, pump: PumpSpy, left: int, pumped: int
) -> None:
    session = long_log(server)
    reading = await server.fetch("GET", f"{READ}?from={session.total_size - left}")
    assert reading.body == log_of(session)[-left:]
    assert (reading.end, len(pump.deliveries)) == ("clean", pumped)


async def test_http_1_0_and_head_are_never_attached(server: Server, pump: PumpSpy) -> None:
    session = long_log(server)
    old = await server.fetch("GET", READ, version="1.0")
    assert (old.body, old.end) == (log_of(session), "closed")
    head = await server.fetch("HEAD", READ)
    assert (head.status, head.headers["x-stream-epoch"]) == (200, session.epoch)
    assert not pump.deliveries


@pytest.fixture
async def tls_server(
    server: Server, tmp_path: Path
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's connection to `server`, over TLS."""
    authority = trustme.CA()
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(theirs)
    ours = ssl.create_default_context()
    authority.configure_trust(ours)
    path = tmp_path / "tls"
    await web.UnixSite(server.runner, path, ssl_context=theirs).start()
    reader, writer = await asyncio.open_unix_connection(
        path, ssl=ours, server_hostname="localhost", limit=1 << 20
    )
    yield reader, writer
    writer.close()
    await writer.wait_closed()


async def test_tls_is_served_without_the_pump(
    server: Server,
    pump: PumpSpy,
    tls_server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    session = long_log(server)
    reader, writer = tls_server
    for _ in range(2):
        writer.write(request_bytes("GET", READ))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert body_of(await reader.readuntil(b"\r\n0\r\n\r\n")) == log_of(session)
    assert not pump.deliveries


def body_of(raw: bytes) -> bytes:
    """The body of chunks."""
    return b"".join(chunks_of(raw))


def chunks_of(raw: bytes) -> list[bytes]:
    """The chunks of a whole body, each without its frame; the last one is checked for."""
    chunks = []
    while True:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        assert raw[length : length + 2] == b"\r\n"
        if not length:
            assert raw == b"\r\n"
            return chunks
        chunks.append(raw[:length])
        raw = raw[length + 2 :]


async def compress(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Content-Encoding"] = "gzip"
    request.writer.enable_compression("gzip")


async def ask_for_compression(_request: web.Request, response: web.StreamResponse) -> None:
    response.enable_compression(web.ContentCoding.gzip)  # too late for aiohttp, which ignores it


@pytest.mark.parametrize(("signal", "pumped"), [(compress, 0), (ask_for_compression, 1)])
async def test_an_embedder_may_compress(pump: PumpSpy, signal: object, pumped: int) -> None:
    app = create_app()
    app.on_response_prepare.append(signal)
    async with serving(app) as server:
        session = long_log(server)
        reading = await server.fetch("GET", READ, {"Accept-Encoding": "gzip"})
        body = bytes(reading.body)
        if "content-encoding" in reading.headers:
            body = gzip.decompress(body)
        assert (body, reading.end) == (log_of(session), "clean")
        assert len(pump.deliveries) == pumped


async def test_unix_sockets_are_pumped_and_kept_alive(
    server: Server, tmp_path: Path, pump: PumpSpy
) -> None:
    session = long_log(server)
    await web.UnixSite(server.runner, tmp_path / "socket").start()
    reader, writer = await asyncio.open_unix_connection(tmp_path / "socket", limit=1 << 20)
    for _ in range(2):
        writer.write(request_bytes("GET", READ))
        await reader.readuntil(b"\r\n\r\n")
        assert body_of(await reader.readuntil(b"\r\n0\r\n\r\n")) == log_of(session)
    assert pump.outcomes == ["end", "end"]
    writer.close()
    await writer.wait_closed()


# --- no descriptor left


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    lowest_free = os.dup(0)
    os.close(lowest_free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("running", [True, False], ids=["for a reader", "for the pump itself"])
async def test_without_a_descriptor_python_serves_the_same_bytes(
    server: Server, pump: PumpSpy, running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    session = long_log(server)
    if running:
        await server.fetch("GET", READ)
    connection = await server.connect()
    await connection.send(request_bytes("GET", "/health"))
    await (await connection.response()).read_to_end()
    for left in (False, True, False):
        with no_descriptor_left() if not left else memoryview(b""):
            await connection.send(request_bytes("GET", READ))
            reading = await connection.response()
            assert await reading.read_to_end() == log_of(session)
        assert reading.end == "clean"
    assert len(pump.deliveries) == 1 + running
    assert [r.levelname for r in caplog.records if "without the pump" in r.message] == [
        "WARNING",
        "WARNING",
    ]


async def test_a_live_stream_is_followed_without_a_descriptor(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_hand_overs(monkeypatch)
    connection = await server.connect()
    for count in range(3):
        await finish_reading(server, connection, count)


# --- one connection, many answers


async def test_keep_alive_goes_on_after_a_pumped_answer(server: Server, pump: PumpSpy) -> None:
    connection = await server.connect()
    for count in range(4):
        await finish_reading(server, connection, count)
        lookup = b'{"conversation_ids": ["c"]}'
        await connection.send(request_bytes("POST", "/v1/streams/lookup", (), lookup))
        found = await connection.response("POST")
        await found.read_to_end()
        assert [each["state"] for each in found.json()] == ["completed"]
    assert pump.outcomes == ["end"] * 4
    assert len(server.runner.server.connections) == 1


async def test_requests_that_come_while_one_is_pumped_are_answered_after_it(
    server: Server, pump: PumpSpy
) -> None:
    sessions = [server.manager.create_or_replace(name) for name in "cde"]
    for session in sessions:
        session.append(token(session.conversation_id))
    connection = await server.connect()
    await connection.send(request_bytes("GET", READ))
    first = await connection.response()
    await first.read_until(b"\n\n")
    await connection.send(
        b"".join(request_bytes("GET", f"/v1/stream/{name}") for name in ("d", "e", "none"))
    )
    for session in reversed(sessions):
        session.finalize()
    assert (texts_of(await first.read_to_end()), first.end) == (["c"], "clean")
    for name in "de":
        reading = await connection.response()
        assert (texts_of(await reading.read_to_end()), reading.end) == ([name], "clean")
    assert (await connection.response()).status == 404
    assert pump.outcomes == ["end"]  # the others were over and short


async def test_a_connection_with_unsent_bytes_is_handed_over_when_they_are_gone(
    pump: PumpSpy,
) -> None:
    app = create_app()
    unsent: list[int] = []

    async def pile_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.set_write_buffer_limits(high=1 << 30)
        return web.Response(body=b"own" * 2_000_000)

    async def note_unsent(request: web.Request, _response: web.StreamResponse) -> None:
        assert request.transport is not None
        unsent.append(request.transport.get_write_buffer_size())

    app.router.add_get("/own", pile_up)
    app.on_response_prepare.append(note_unsent)
    async with serving(app) as server:
        session = long_log(server)
        connection = await server.connect(receive_buffer_bytes=4096)
        await connection.send(request_bytes("GET", "/own") + request_bytes("GET", READ))
        await until(lambda: len(unsent) == 2)
        assert unsent[1] > 100_000
        assert not pump.deliveries
        own = await connection.response()
        assert await own.read_to_end() == b"own" * 2_000_000
        reading = await connection.response()
        assert (await reading.read_to_end(), reading.end) == (log_of(session), "clean")
        assert pump.outcomes == ["end"]


async def test_a_head_that_does_not_fit_goes_before_the_body(pump: PumpSpy) -> None:
    app = create_app()
    value = "v" * 8_000

    async def grow(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update({f"X-Large-{n}": value for n in range(100)})

    app.on_response_prepare.append(grow)
    async with serving(app) as server:
        session = long_log(server)
        connection = await server.connect(receive_buffer_bytes=32 * 1024)
        await connection.send(request_bytes("GET", READ))
        reading = await connection.response()
        assert reading.headers["x-large-99"] == value
        assert (await reading.read_to_end(), reading.end) == (log_of(session), "clean")
        assert pump.outcomes == ["end"]


# --- figures


@pytest.mark.usefixtures("delivery_path")
@pytest.mark.parametrize("size_bytes", [1000, 600_000])
async def test_the_access_log_tells_the_bytes_that_went_over_the_wire(
    caplog: pytest.LogCaptureFixture, size_bytes: int
) -> None:
    caplog.set_level(logging.INFO, "aiohttp.access")
    app = create_app()
    runner = web.AppRunner(app, access_log_format="sent %b")
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server = Server(app, runner)
    session = app[CONTEXT].manager.create_or_replace("c")
    connection = await server.connect()
    await connection.send(request_bytes("GET", READ))
    for _ in range(size_bytes // 1000):
        session.append(token("x" * 900))
        await asyncio.sleep(0)
    session.finalize()
    while not connection.buffer.endswith(b"\r\n0\r\n\r\n"):
        await connection.fill()
    await until(lambda: bool(caplog.records))
    (line,) = [record for record in caplog.records if record.name == "aiohttp.access"]
    assert line.getMessage() == f"sent {len(connection.buffer)}"
    connection.close()
    await runner.cleanup()


async def test_coalesce_ms_bounds_how_often_a_stream_is_sent(serve: Serve) -> None:
    server = await serve(coalesce_ms=100)
    session = server.manager.create_or_replace("c")
    connection = await server.connect()
    await connection.send(request_bytes("GET", READ))
    await until(lambda: session.snapshot().readers == 1)
    loop = asyncio.get_running_loop()
    begun_at = loop.time()
    for number in range(60):
        session.append(token(f"{number}"))
        await asyncio.sleep(0.005)
    session.finalize()
    response = await connection.response()
    while not connection.buffer.endswith(b"\r\n0\r\n\r\n"):
        await connection.fill()
    took_s = loop.time() - begun_at
    sent = chunks_of(bytes(connection.buffer))
    assert texts_of(b"".join(sent)) == [f"{number}" for number in range(60)]
    # What is sent at once is two chunks where the log's storage has a border.
    assert len(sent) <= 2 * (2 + took_s / 0.1) < 60
    assert response.status == 200


async def test_one_thread_serves_all_streams_and_ends_with_the_server(
    server: Server, pump: PumpSpy
) -> None:
    assert pump_threads() == 0  # made for the first that needs it
    sessions = [server.manager.create_or_replace(f"c{n}") for n in range(10)]
    for session in sessions:
        session.append(token("a"))
    readers = [await server.open("GET", f"/v1/stream/c{n % 10}") for n in range(30)]
    for reader in readers:
        await reader.read_until(b"\n\n")
    assert len(pump.deliveries) == 30
    assert pump_threads() == 1
    await server.runner.cleanup()
    for reader in readers:
        assert texts_of(await reader.read_to_end()) == ["a", "shutdown"]
        assert reader.end == "clean"
    await until(lambda: pump_threads() == 0)


@pytest.mark.parametrize("ending", ["completed", "shutdown"])
async def test_coalesce_ms_holds_back_no_end(serve: Serve, ending: str) -> None:
    server = await serve(coalesce_ms=3_600_000)
    session = server.manager.create_or_replace("c")
    response = await server.open("GET", READ)
    session.append(token("a"))
    await response.read_until(b"\n\n")
    session.append(token("b"))
    if ending == "completed":
        session.finalize()
    else:
        await server.runner.cleanup()
    texts = texts_of(await response.read_to_end())
    assert texts[:2] == ["a", "b"]
    assert texts[2:] == ([] if ending == "completed" else ["shutdown"])
    assert response.end == "clean"


async def test_coalesce_ms_does_not_pace_a_replay(serve: Serve) -> None:
    server = await serve(coalesce_ms=3_600_000)
    session = server.manager.create_or_replace("c")
    for number in range(1000):
        session.append(token(f"{number}" * 200))
    response = await server.open("GET", READ)
    while len(response.body) < session.total_size:
        await response.read_more()
    session.finalize()
    await response.read_to_end()
    assert response.end == "clean"
