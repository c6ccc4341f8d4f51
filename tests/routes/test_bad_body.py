"""What a client can get wrong about a body: each has its exact answer, none a traceback."""

import asyncio
import gzip
import zlib

import pytest
from fake_upstream import DONE, FakeUpstream, stream
from serving import Connection, Serve, Server, assert_refused, request_bytes

CHAT = "/v1/chat/completions"
LOOKUP = "/v1/streams/lookup"


BAD_BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "not JSON": b"hello",
    "cut short": b'{"stream": tru',
    "more behind it": b'{"stream": true} x',
    "single quotes": b"{'stream': true}",
    "comma": b'{"stream": true,}',
    "array": b"[]",
    "array of objects": b'[{"stream": true}]',
    "string": b'"stream"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"stream": true, "n": NaN}',
    "Infinity": b'{"stream": true, "n": -Infinity}',
    "lone surrogate": b'{"stream": true, "p": "\\ud800"}',
    "lone surrogate as a key": b'{"stream": true, "\\udfff": 1}',
    "raw surrogate": b'{"stream": true, "p": "\xed\xa0\x80"}',
    "not UTF-8": b'{"stream": true, "p": "\xff"}',
    "UTF-16": '{"stream": true}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"stream": true}',
    "control character": b'{"stream": true, "p": "\x00"}',
    "NUL behind it": b'{"stream": true}\x00',
    "deep arrays": b'{"stream": true, "p": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"stream": true, "p": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "deep and open": b'{"p": ' + b"[" * 1_000_000,
    "gzip without saying so": gzip.compress(b'{"stream": true}'),
}


@pytest.mark.parametrize("target", [CHAT, "/v1/messages", LOOKUP])
@pytest.mark.parametrize("case", BAD_BODIES)
async def test_a_body_that_is_no_json_object_is_refused(
    server: Server, upstream: FakeUpstream, case: str, target: str
) -> None:
    for headers in ({"X-Conversation-Id": "c"}, {}):
        assert_refused(
            await server.fetch("POST", target, headers, BAD_BODIES[case]), "invalid_body"
        )
    assert not upstream.exchanges
    assert len(server.manager) == 0


@pytest.mark.parametrize(
    "extra",
    [b"1e400", b"-1e400", b"1" * 1000, b"1e-400", b"0.1", b'"\\ud83e\\udd99"', b'"\\u0000"'],
)
async def test_what_is_valid_json_is_left_to_the_upstream(
    server: Server, upstream: FakeUpstream, extra: bytes
) -> None:
    upstream.play(stream(DONE))
    body = b'{"stream": true, "x": ' + extra + b"}"
    response = await server.fetch("POST", CHAT, {"X-Conversation-Id": "c"}, body)
    assert response.status in (200, 400)
    if response.status == 200:
        assert upstream.exchanges[0].body == body
    else:  # a number that no double holds: orjson says it is not valid
        assert_refused(response, "invalid_body")


@pytest.mark.parametrize("value", [b"1", b'"true"', b"null", b"[]", b"{}", b"false", b"0"])
async def test_only_stream_true_makes_a_stream(
    server: Server, upstream: FakeUpstream, value: bytes
) -> None:
    upstream.play(stream(DONE))
    body = b'{"stream": ' + value + b"}"
    response = await server.fetch("POST", CHAT, {"X-Conversation-Id": "c"}, body)
    assert response.body == DONE  # passed through, as the upstream would have it
    assert "x-stream-epoch" not in response.headers
    assert len(server.manager) == 0


@pytest.mark.parametrize("ids", [None, "c", {}, {"c": 1}, 1, True])
async def test_ids_of_a_lookup_that_are_no_array_are_refused(server: Server, ids: object) -> None:
    response = await server.fetch("POST", LOOKUP, json={"conversation_ids": ids})
    assert (response.status, response.error["reason"]) == (400, "invalid_body")
    assert response.error["message"] == "conversation_ids must be an array"
    response = await server.fetch("POST", LOOKUP, json={"ids": ["c"]})
    assert (response.status, response.error["reason"]) == (400, "invalid_body")


@pytest.mark.parametrize("item", [1, None, True, ["c"], {"id": "c"}, 1.5])
async def test_an_item_of_a_lookup_that_is_no_string_matches_nothing(
    server: Server, item: object
) -> None:
    response = await server.fetch("POST", LOOKUP, json={"conversation_ids": [item]})
    assert (response.status, response.json()) == (200, [])


async def test_too_many_ids_and_too_long_a_lookup_are_refused(server: Server) -> None:
    many = {"conversation_ids": ["c"] * 10_001}
    response = await server.fetch("POST", LOOKUP, json=many)
    assert (response.status, response.error["reason"]) == (400, "invalid_body")
    assert response.error["max_ids"] == 10_000
    long = {"conversation_ids": ["c" * 255] * 8200}
    response = await server.fetch("POST", LOOKUP, json=long)
    assert response.status == 413
    assert response.error == {
        "max_body_bytes": 2 * 1024 * 1024,
        "code": 413,
        "type": "invalid_request_error",
        "message": "The request body is too large",
        "reason": "body_too_large",
    }


async def test_a_body_beyond_the_limit_is_413_one_at_the_limit_is_not(
    serve: Serve, upstream: FakeUpstream
) -> None:
    server = await serve(max_body_bytes=10_000)
    upstream.play(stream(DONE))
    fits = b'{"stream": true, "p": "' + b"x" * 9_975 + b'"}'
    assert len(fits) == 10_000
    assert (await server.fetch("POST", CHAT, {"X-Conversation-Id": "c"}, fits)).status == 200
    for target in (CHAT, "/tokenize"):
        response = await server.fetch("POST", target, {"X-Conversation-Id": "c"}, fits + b" ")
        assert (response.status, response.error["reason"]) == (413, "body_too_large")
        assert response.error["max_body_bytes"] == 10_000


# --- bodies that are not what their headers say


def packed(body: bytes, encoding: str) -> bytes:
    return request_bytes(
        "POST", CHAT, {"Content-Encoding": encoding, "X-Conversation-Id": "c"}, body
    )


async def test_a_packed_body_is_unpacked(server: Server, upstream: FakeUpstream) -> None:
    upstream.play(stream(DONE))
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        response = await server.exchange(packed(pack(b'{"stream": true}'), encoding))
        assert response.status == 200
    assert {exchange.body for exchange in upstream.exchanges} == {b'{"stream": true}'}
    assert "content-encoding" not in upstream.exchanges[0].headers


async def test_a_small_body_that_unpacks_to_a_huge_one_is_413(serve: Serve) -> None:
    server = await serve(max_body_bytes=100_000)
    bomb = gzip.compress(b'{"p": "' + b"x" * 50_000_000 + b'"}')
    response = await server.exchange(packed(bomb, "gzip"))
    assert (response.status, response.error["reason"]) == (413, "body_too_large")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_body_that_is_not_packed_as_it_says_is_refused(
    server: Server, encoding: str
) -> None:
    for body in (b'{"stream": true}', b"", gzip.compress(b"[" * 1000)[:-30], b"\x1f\x8b\x08" * 9):
        response = await server.exchange(packed(body, encoding))
        assert response.status == 400


async def test_a_body_of_unknown_encoding_is_refused(server: Server) -> None:
    assert (await server.exchange(packed(b"\x00\x01\x02", "x-unknown"))).status == 400


async def test_a_bad_chunk_size_is_refused(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n"
    for chunks in (b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"fffffffffffffffff\r\n{}\r\n"):
        assert (await server.exchange(head.encode() + chunks)).status == 400
    assert {record.name for record in caplog.records} <= {"aiohttp.server"}
    caplog.clear()  # aiohttp's own log has the story


async def test_a_body_that_comes_to_a_halt_is_given_up(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse_halted_bodies(await serve(body_idle_timeout_s=0.2))
    assert {record.name for record in caplog.records} <= {"aiohttp.server"}
    caplog.clear()  # aiohttp's own log has the story


async def refuse_halted_bodies(server: Server) -> None:
    chunked = (
        f"POST {LOOKUP} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n"
    )
    for started, later in (
        (request_bytes("POST", CHAT, (), b"x" * 100)[:-50], b""),
        (chunked.encode(), b"zz\r\n"),  # from here on aiohttp hears nothing any more
    ):
        connection = await server.connect()
        await connection.send(started)
        await asyncio.sleep(0.01)  # until the handler waits for the rest
        await connection.send(later)
        response = await connection.response("POST")
        await response.read_to_end()
        assert_refused(response, "invalid_body")
        assert not await connection.fill()
        assert connection.end == "closed"


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_no_trace(
    server: Server,
) -> None:
    for target in (CHAT, LOOKUP, "/tokenize"):
        raw = request_bytes("POST", target, {"X-Conversation-Id": "c"}, b"x" * 1000)
        for leave in (Connection.close, Connection.reset):
            connection = await server.connect()
            await connection.send(raw[:-500])
            await asyncio.sleep(0.01)  # until the handler waits for the rest
            leave(connection)
    assert (await server.fetch("GET", "/health")).status == 200
    assert len(server.manager) == 0
