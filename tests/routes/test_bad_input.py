"""What a client can get wrong about positions, ids and addresses: each has its exact answer.

(Nothing is logged as an error, no traceback least: a fixture of this folder holds that.)
"""

import pytest
from fake_upstream import DONE, FakeUpstream, stream, token
from serving import Server, assert_refused

CHAT = "/v1/chat/completions"
LOOKUP = "/v1/streams/lookup"


# --- positions


BAD_POSITIONS = [
    *("-1", "%2B1", "+1", "1_0", "1e3", "1.0", "0x10", "", "%201", "1%20", "1%0a", "%00", "NaN"),
    *(str(2**63), "9" * 20, "9" * 5000, "0" * 65, "%D9%A3", "%EF%BC%91", "%FF", "%ED%A0%80"),
    *("EARLIEST", "earliest%20", "latest", "null", "true", "[]", "1,2", "1;2"),
    *("-", "abc-", "-5", "abc--5", "abc-+5", "ABC-5", "a.c-5", "abc-5-6", "abc-earliest", "abc_5"),
    *("a" * 14 + "-5", f"abc-{2**63}", "abc-%D9%A3", "a%C3%BC-5", "abc-5%0A"),
]


@pytest.mark.parametrize("live", [True, False], ids=["live", "over"])
async def test_a_malformed_position_is_invalid_offset(server: Server, live: bool) -> None:
    session = server.manager.create_or_replace("c")
    session.append(token("a"))
    if not live:
        session.finalize()
    for position in BAD_POSITIONS:
        for method in ("GET", "HEAD"):
            response = await server.fetch(method, f"/v1/stream/c?from={position}")
            assert response.status == 400, position
        assert_refused(
            await server.fetch("GET", f"/v1/stream?conv_id=c&from={position}"), "invalid_offset"
        )
    for query in ("from=1&from=1", "from=1&from=", "from", "from=0&fro%6D=0"):
        assert_refused(await server.fetch("GET", f"/v1/stream/c?{query}"), "invalid_offset")
    session.finalize()


@pytest.mark.parametrize(
    "value",
    [
        *(b"0", b"5", b"earliest", b"abc", b"-5", b"abc-", b"ABC-5", b"abc-+5", b"abc-5 6"),
        *(b"abc-%d" % 2**63, b"a" * 14 + b"-5", b"a" * 5000, b"\xff-5", b"abc-\xd9\xa3"),
    ],
)
async def test_a_malformed_last_event_id_is_invalid_offset(server: Server, value: bytes) -> None:
    server.manager.create_or_replace("c").finalize()
    headers = [("Last-Event-ID", value)]
    assert_refused(await server.fetch("GET", "/v1/stream/c?from=0", headers), "invalid_offset")


async def test_two_last_event_ids_are_invalid_offset(server: Server) -> None:
    epoch = server.manager.create_or_replace("c").epoch
    headers = [("Last-Event-ID", f"{epoch}-0"), ("Last-Event-ID", f"{epoch}-0")]
    assert_refused(await server.fetch("GET", "/v1/stream/c", headers), "invalid_offset")


# --- conversation ids


BAD_IDS = [
    *(".", "..", "%2E", "%2e%2E", "a" * 256, "%C3%BC" * 128, "%FF", "a%C3", "%ED%A0%80"),
    *("%00", "a%00b", "a%0Ab", "a%0D%0AX-Evil:%201", "%7F", "%C2%80", "%C2%9F", "a%1B[2J"),
]


@pytest.mark.parametrize("conversation_id", BAD_IDS)
async def test_a_malformed_id_is_refused_wherever_it_is_given(
    server: Server, conversation_id: str
) -> None:
    for method, target, body in (
        ("GET", f"/v1/stream/{conversation_id}", None),
        ("GET", f"/v1/stream?conv_id={conversation_id}", None),
        ("DELETE", f"/v1/stream/{conversation_id}", None),
        ("DELETE", f"/v1/stream?conv_id={conversation_id}", None),
        ("POST", f"{CHAT}?conv_id={conversation_id}", b'{"stream": true}'),
    ):
        response = await server.fetch(method, target, (), body)
        assert_refused(response, "invalid_conversation_id")


@pytest.mark.parametrize(
    "raw", [b".", b"..", b"a" * 256, "ü".encode() * 128, b"\xff", b"\xed\xa0\x80", "\x85".encode()]
)
async def test_a_malformed_id_in_the_header_is_refused(server: Server, raw: bytes) -> None:
    response = await server.fetch("POST", CHAT, [("X-Conversation-Id", raw)], b'{"stream": true}')
    assert_refused(response, "invalid_conversation_id")


async def test_an_absent_id_or_two_are_refused(server: Server) -> None:
    for query in ("", "?conv_id=", "?conv_id", "?conv_id=a&conv_id=a", "?id=a"):
        for method in ("GET", "DELETE"):
            response = await server.fetch(method, f"/v1/stream{query}")
            assert_refused(response, "invalid_conversation_id")
    headers = [("X-Conversation-Id", "a"), ("X-Conversation-Id", "b")]
    response = await server.fetch("POST", CHAT, headers, b'{"stream": true}')
    assert_refused(response, "invalid_conversation_id")


@pytest.mark.parametrize(
    "conversation_id",
    [
        *("a" * 255, "ü" * 127, "...", "a/../b", "//", "a::b::c", "%25", "?&=#+", " ", "a b"),
        *("\u200b", "🦙", "\ufeff", "\u2028", '"', "\\", "<script>", "%00", "../../etc/passwd"),
    ],
)
async def test_an_odd_but_wellformed_id_works_everywhere(
    server: Server, upstream: FakeUpstream, conversation_id: str
) -> None:
    upstream.play(stream(DONE))
    quoted = "".join(f"%{byte:02X}" for byte in conversation_id.encode())
    posted = await server.fetch("POST", f"{CHAT}?conv_id={quoted}", (), b'{"stream": true}')
    assert posted.status == 200
    assert server.session(conversation_id).epoch == posted.headers["x-stream-epoch"]
    for target in (f"/v1/stream/{quoted}", f"/v1/stream?conv_id={quoted}"):
        assert (await server.fetch("GET", target)).body == posted.body
    body = {"conversation_ids": [conversation_id]}
    (found,) = (await server.fetch("POST", LOOKUP, json=body)).json()
    assert found["conversation_id"] == conversation_id
    assert (await server.fetch("DELETE", f"/v1/stream/{quoted}")).status == 204
    assert len(server.manager) == 0


# --- everything else


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("PUT", "/v1/stream/c", "DELETE, GET, HEAD"),
        ("POST", "/v1/stream", "DELETE, GET, HEAD"),
        ("GET", "/v1/streams/lookup", "POST"),
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/health", "GET, HEAD"),
        ("PATCH", "/ready", "GET, HEAD"),
    ],
)
async def test_another_method_is_405_and_names_those_there_are(
    server: Server, method: str, target: str, allowed: str
) -> None:
    response = await server.fetch(method, target)
    assert response.status == 405
    assert response.headers["allow"] == allowed
    assert response.error["reason"] == "method_not_allowed"


@pytest.mark.parametrize(
    "target",
    [
        *("/v1", "/v1/streams/", "/v1/nothing", "//v1/stream/c"),
        *("/v1/stre%2Fam/c", "/../v1/stream/c", "/v1/models/", "/slots/0", "/%00", "/%FF"),
    ],
)
async def test_anything_else_is_404_in_the_same_shape(server: Server, target: str) -> None:
    server.manager.create_or_replace("c").finalize()
    response = await server.fetch("GET", target)
    assert response.status == 404
    assert response.error == {
        "code": 404,
        "type": "not_found_error",
        "message": "There is nothing at this address",
        "reason": "not_found",
    }


async def test_a_path_may_be_percent_encoded_anywhere(server: Server) -> None:
    session = server.manager.create_or_replace("a/c")
    server.manager.create_or_replace("m/a/c")
    for target in ("/v1/%73tream/a/c", "/%76%31/%73%74ream/%61%2Fc"):
        response = await server.fetch("HEAD", target)
        assert response.headers["x-stream-epoch"] == session.epoch


async def test_an_expectation_that_cannot_be_met_is_417(server: Server) -> None:
    response = await server.fetch("POST", CHAT, {"Expect": "a miracle"}, b"{}")
    assert (response.status, response.end) == (417, "clean")


async def test_bytes_of_the_query_that_are_not_utf8_are_ignored_elsewhere(server: Server) -> None:
    server.manager.create_or_replace("c").finalize()
    assert (await server.fetch("GET", "/v1/stream/c?%FF=%FF&x=%ED%A0%80&=&&")).status == 204


@pytest.mark.parametrize(
    "raw",
    [
        b"GET  HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /v1/stream/c HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET /v1/stream/c HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        b"POST /v1/streams/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n{}",
    ],
)
async def test_what_aiohttps_parser_refuses_gets_its_plain_400(
    server: Server, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    response = await server.exchange(raw)
    assert response.status == 400
    assert b"Traceback" not in response.body
    assert {record.name for record in caplog.records} <= {"aiohttp.server"}
    caplog.clear()  # aiohttp's own log has the story
