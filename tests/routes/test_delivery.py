"""How a log's bytes reach a client: exactly, bounded, with an end that is told from a loss."""

import asyncio
import socket
from pathlib import Path

import pytest
from aiohttp import web
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, STALL, FakeUpstream, chunk, stream, token
from serving import Connection, Response, Serve, Server, request_bytes, texts_of, until

import pyserve

pytestmark = pytest.mark.usefixtures("delivery_path")

READ = "/v1/stream/c"


def filled(server: Server, size_bytes: int) -> pyserve.StreamSession:
    """A live session with about so many bytes."""
    session = server.manager.create_or_replace("c")
    for _ in range(size_bytes // 1000):
        session.append(token("x" * 900))
    return session


async def slow_reader(server: Server, version: str = "1.1") -> tuple[Connection, Response]:
    """A client that has read the head and takes nothing more."""
    connection = await server.connect(receive_buffer_bytes=4096)
    await connection.send(request_bytes("GET", READ, version=version))
    return connection, await connection.response()


# --- the same bytes for everybody


async def test_many_readers_of_one_stream_get_the_same_bytes(
    server: Server, upstream: FakeUpstream
) -> None:
    steps = [asyncio.Event() for _ in range(3)]
    script: list[bytes | asyncio.Event] = [SSE_HEAD]
    for number, step in enumerate(steps):
        script += [chunk(token(f"{number} ") * 50 + token("half")[:11]), step]
        script += [chunk(token("half")[11:])]
    upstream.play((*script, chunk(DONE), LAST_CHUNK))
    readers = [await server.post("c")]
    for step in steps:
        readers += [await server.open("GET", READ) for _ in range(20)]
        step.set()
    bodies = {await reader.read_to_end() for reader in readers}
    (body,) = bodies
    assert len(texts_of(body)) == 3 * 51 + 1
    assert {reader.end for reader in readers} == {"clean"}


async def test_a_large_log_arrives_whole(server: Server) -> None:
    session = filled(server, 5_000_000)
    session.finalize()
    response = await server.fetch("GET", READ)
    assert len(response.body) == session.total_size
    assert len(texts_of(response.body)) == 5000
    assert response.end == "clean"


async def test_a_unix_socket_serves_the_same(server: Server, tmp_path: Path) -> None:
    session = filled(server, 1_000_000)
    await web.UnixSite(server.runner, tmp_path / "socket").start()
    reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
    writer.write(request_bytes("GET", READ, version="1.0"))
    session.finalize()
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert raw.endswith((await server.fetch("GET", READ)).body)


# --- readers that cannot keep up


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_reader_whose_next_byte_was_dropped_is_reset(serve: Serve, version: str) -> None:
    server = await serve(max_session_bytes=300_000)
    session = filled(server, 100_000)
    _, response = await slow_reader(server, version)
    await response.read_until(b"data: ")
    while session.dropped_prefix < 1_000_000:
        session.append(token("x" * 900))
        await asyncio.sleep(0)
    body = await response.read_to_end()
    assert response.end == "reset"
    assert body.startswith(token("x" * 900)[:-1])
    assert len(body) < session.dropped_prefix
    session.finalize()


async def test_a_lost_reader_has_read_a_true_prefix(serve: Serve) -> None:
    server = await serve(max_session_bytes=300_000)
    session = server.manager.create_or_replace("c")
    session.append(token("0"))
    _, response = await slow_reader(server)
    await response.read_until(b"\n\n")
    number = 0
    while session.dropped_prefix < 1_000_000:
        number += 1
        session.append(token(f"{number}"))
        if number % 100 == 0:
            await asyncio.sleep(0)
    body = await response.read_to_end()
    assert response.end == "reset"
    texts = texts_of(body[: body.rindex(b"\n\n") + 2])
    assert texts == [str(n) for n in range(len(texts))]
    session.finalize()


async def test_a_reader_that_takes_nothing_is_reset_after_the_write_timeout(serve: Serve) -> None:
    server = await serve(write_timeout_s=0.2)
    session = filled(server, 2_000_000)
    _, response = await slow_reader(server)
    await until(lambda: session.snapshot().readers == 1)
    await until(lambda: session.snapshot().readers == 0)
    await response.read_to_end()
    assert response.end == "reset"
    session.finalize()


async def test_a_reader_that_takes_a_little_is_not_timed_out(serve: Serve) -> None:
    server = await serve(write_timeout_s=0.6)
    session = filled(server, 2_200_000)
    session.finalize()
    _, response = await slow_reader(server)
    while response.end is None:
        size = len(response.body)
        while response.end is None and len(response.body) < size + 200_000:
            await response.read_more()
        await asyncio.sleep(0.1)
    assert response.end == "clean"
    assert len(response.body) == session.total_size


async def test_waiting_for_a_silent_stream_is_no_write_timeout(serve: Serve) -> None:
    server = await serve(write_timeout_s=0.05, heartbeat_interval_s=30.0)
    session = server.manager.create_or_replace("c")
    response = await server.open("GET", READ)
    await asyncio.sleep(0.15)
    session.append(token("a"))
    session.finalize()
    assert texts_of(await response.read_to_end()) == ["a"]
    assert response.end == "clean"


async def test_what_a_stalled_reader_holds_is_bounded(serve: Serve) -> None:
    server = await serve(send_buffer_bytes=64 * 1024)
    session = filled(server, 8_000_000)
    connection, response = await slow_reader(server)
    await asyncio.sleep(0.1)  # it has taken all that it can
    session.cancel()
    server.manager.evict("c")
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    (transport,) = {each.transport for each in server.runner.server.connections}
    kernel = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert kernel <= 2 * 64 * 1024  # Linux tells twice what was set
    assert transport.get_write_buffer_size() <= 3 * 64 * 1024
    await response.read_to_end()
    assert len(response.body) == session.total_size


# --- clients that leave


LEAVINGS = {
    "closes": Connection.close,
    "resets": Connection.reset,
    "half-closes": lambda connection: connection.socket.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("way", LEAVINGS)
async def test_a_reader_that_leaves_is_noticed_and_changes_nothing(serve: Serve, way: str) -> None:
    server = await serve(heartbeat_interval_s=0.05)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    response = await server.open("GET", READ)
    await response.read_until(b"\n\n")
    assert session.snapshot().readers == 1
    LEAVINGS[way](response.connection)
    await until(lambda: session.snapshot().readers == 0)
    assert session.is_live
    session.append(token("b"))
    session.finalize()
    assert texts_of((await server.fetch("GET", READ)).body) == ["a", "b"]


@pytest.mark.parametrize("way", LEAVINGS)
async def test_a_reader_that_leaves_while_it_is_written_to_is_noticed(server: Server, way) -> None:
    session = filled(server, 4_000_000)
    connection, _ = await slow_reader(server)
    assert session.snapshot().readers == 1
    LEAVINGS[way](connection)
    if way == "half-closes":  # what is on its way is still taken by the kernel
        connection.close()
    await until(lambda: session.snapshot().readers == 0)
    session.finalize()


async def test_a_half_closed_clients_body_has_no_clean_end(serve: Serve) -> None:
    server = await serve(heartbeat_interval_s=0.05)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    response = await server.open("GET", READ)
    await response.read_until(b"\n\n")
    response.connection.socket.shutdown(socket.SHUT_WR)
    await response.read_to_end()
    assert response.end in ("closed", "reset")
    assert session.is_live
    session.finalize()


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_over_http_1_0_a_half_closed_client_is_reset(serve: Serve) -> None:
    server = await serve(heartbeat_interval_s=0.05)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    response = await server.open("GET", READ, version="1.0")
    await response.read_until(b"\n\n")
    response.connection.socket.shutdown(socket.SHUT_WR)
    await response.read_to_end()
    assert response.end == "reset"  # a FIN would be the body's end
    session.finalize()


async def test_a_slow_client_with_a_small_buffer_is_not_taken_for_dead(serve: Serve) -> None:
    server = await serve(write_timeout_s=0.4)
    session = filled(server, 900_000)
    session.finalize()
    connection, response = await slow_reader(server)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 1.5
    while loop.time() < until_s:  # far less than what makes room for a write
        await response.read_more()
        await asyncio.sleep(0.02)
    assert response.end is None
    connection.reset()


async def test_a_thousand_readers_that_come_and_go_leave_nothing_behind(serve: Serve) -> None:
    server = await serve(heartbeat_interval_s=0.05)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    for _ in range(20):
        readers = await asyncio.gather(*(server.open("GET", READ) for _ in range(50)))
        assert session.snapshot().readers >= 50
        for reader in readers:
            reader.connection.reset()
    await until(lambda: session.snapshot().readers == 0)
    await until(lambda: not server.runner.server.connections)
    session.finalize()


async def test_the_post_counts_as_a_reader_and_a_lookup_tells(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, chunk(token("a")), STALL))
    posted = await server.post("c")
    await posted.read_until(b"\n\n")
    await server.open("GET", READ)
    (found,) = (
        await server.fetch("POST", "/v1/streams/lookup", json={"conversation_ids": ["c"]})
    ).json()
    assert found["readers"] == 2


# --- HEAD, HTTP/1.0, one connection for many requests


@pytest.mark.parametrize("live", [True, False], ids=["live", "over"])
async def test_head_answers_the_headers_of_a_get_at_once_and_is_no_reader(
    serve: Serve, live: bool
) -> None:
    server = await serve(heartbeat_interval_s=0.05)
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    if not live:
        session.finalize()
    connection = await server.connect()
    for target in (READ, READ + "?from=3", "/v1/stream?conv_id=c&from=earliest"):
        await connection.send(request_bytes("HEAD", target))
        head = await connection.response("HEAD")
        assert session.snapshot().readers == 0
        get = await server.open("GET", target)
        volatile = {"date", "x-request-id", "transfer-encoding"}  # the last is the body's
        assert {k: v for k, v in head.headers.items() if k not in volatile} == {
            k: v for k, v in get.headers.items() if k not in volatile
        }
        assert (head.status, get.status) == (200, 200)
        get.connection.reset()
        await until(lambda: session.snapshot().readers == 0)
    await connection.send(request_bytes("GET", "/health"))
    assert (await connection.response()).status == 200
    session.finalize()


async def test_head_has_the_statuses_of_get(server: Server) -> None:
    session = server.manager.create_or_replace("c")
    session.finalize()
    for target, status in ((READ, 204), ("/v1/stream/d", 404), (READ + "?from=x", 400)):
        response = await server.open("HEAD", target)
        assert (response.status, response.end) == (status, "clean")
        assert not response.connection.buffer


async def test_http_1_0_gets_the_bare_bytes_and_the_end_of_the_connection(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(token("a"), DONE))
    posted = await server.fetch(
        "POST", "/v1/completions", {"X-Conversation-Id": "c"}, json={"stream": True}, version="1.0"
    )
    assert texts_of(posted.body) == ["a", "[DONE]"]
    assert posted.end == "closed"
    assert "transfer-encoding" not in posted.headers
    reading = await server.fetch("GET", READ, version="1.0")
    assert (reading.body, reading.end) == (posted.body, "closed")


async def test_a_connection_serves_another_request_after_a_finished_stream(
    server: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(token("a"), DONE))
    connection = await server.connect()
    body = b'{"stream": true}'
    for _ in range(3):
        headers = {"X-Conversation-Id": "c"}
        await connection.send(request_bytes("POST", "/v1/completions", headers, body))
        response = await connection.response("POST")
        assert texts_of(await response.read_to_end()) == ["a", "[DONE]"]
        assert response.end == "clean"
        await connection.send(request_bytes("GET", READ))
        again = await connection.response()
        assert await again.read_to_end() == response.body


async def test_pipelined_requests_are_answered_in_turn(server: Server) -> None:
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    connection = await server.connect()
    await connection.send(
        request_bytes("GET", READ)
        + request_bytes("GET", "/v1/stream/unknown")
        + request_bytes("DELETE", READ)
    )
    reading = await connection.response()
    await reading.read_until(b"\n\n")
    session.append(token("b"))
    session.finalize()
    assert texts_of(await reading.read_to_end()) == ["a", "b"]
    assert (reading.status, reading.end) == (200, "clean")
    missing = await connection.response()
    await missing.read_to_end()
    assert missing.status == 404
    assert (await connection.response("DELETE")).status == 204
    assert len(server.manager) == 0


async def test_a_204_leaves_the_connection_usable(server: Server) -> None:
    server.manager.create_or_replace("c").finalize()
    connection = await server.connect()
    for _ in range(2):
        await connection.send(request_bytes("GET", READ))
        response = await connection.response()
        assert response.status == 204
        assert not connection.buffer
