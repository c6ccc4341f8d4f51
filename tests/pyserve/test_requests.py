"""What a request says, read strictly."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from pyserve.errors import ApiError
from pyserve.requests import (
    conversation_id_in_url,
    conversation_id_of_post,
    parse_json_object,
    query_values,
    sole_query_value,
)
from pyserve.routes.streams import add_stream_routes

POST = "/v1/chat/completions"


async def resolved(path: str, prefix: str = "") -> web.Request:
    """A GET of `path`, as an application with the reading routes under `prefix` sees it."""
    subapp = web.Application()
    add_stream_routes(subapp)
    app = subapp
    if prefix:
        app = web.Application()
        app.add_subapp(prefix, subapp)
    request = make_mocked_request("GET", path)
    match = await app.router.resolve(request)
    request._match_info = match  # type: ignore[assignment]
    return request


def reason_of(error: pytest.ExceptionInfo[ApiError]) -> str:
    return error.value.reason


# --- the query


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("", []),
        ("from", [""]),
        ("from=", [""]),
        ("from=1", ["1"]),
        ("from=1&from=2", ["1", "2"]),
        ("a=b&from=1&c", ["1"]),
        ("fr%6Fm=1", ["1"]),
        ("from=%31", ["1"]),
        ("from=1%26from%3D2", ["1&from=2"]),
        ("from=a+b%2Bc", ["a b+c"]),
        ("from=a=b", ["a=b"]),
        ("FROM=1&xfrom=2&from2=3", []),
        ("from=%C3%A4", ["ä"]),
        ("from=%zz", ["%zz"]),
    ],
)
def test_all_values_of_a_parameter_decoded(query: str, values: list[str]) -> None:
    assert query_values(make_mocked_request("GET", f"/?{query}"), "from") == values


def test_bytes_that_are_not_utf8_never_become_text() -> None:
    (value,) = query_values(make_mocked_request("GET", "/?from=%ff%c3"), "from")
    with pytest.raises(UnicodeEncodeError):
        value.encode()


def test_a_parameter_stands_once() -> None:
    assert sole_query_value(make_mocked_request("GET", "/?from=1"), "from", "invalid_offset") == "1"
    for query in ("", "from=1&from=1", "from=1&from=2"):
        with pytest.raises(ApiError) as raised:
            sole_query_value(make_mocked_request("GET", f"/?{query}"), "from", "invalid_offset")
        assert reason_of(raised) == "invalid_offset"


# --- the conversation id

IDS_IN_PATHS = [
    ("abc", "abc"),
    ("a/b", "a/b"),
    ("a/b::model.gguf", "a/b::model.gguf"),
    ("a%2Fb", "a/b"),
    ("a%252Fb", "a%2Fb"),
    ("%25", "%"),
    ("a+b", "a+b"),
    ("a%20b", "a b"),
    ("gr%C3%BC%C3%9Fe", "grüße"),
    ("a//b/", "a//b/"),
    ("a%3Fb%23c", "a?b#c"),
    ("x" * 255, "x" * 255),
]


@pytest.mark.parametrize("prefix", ["", "/llm", "/a/b"])
@pytest.mark.parametrize(("path", "expected"), IDS_IN_PATHS)
async def test_the_id_in_a_path_is_decoded_once(prefix: str, path: str, expected: str) -> None:
    request = await resolved(f"{prefix}/v1/stream/{path}", prefix)
    assert conversation_id_in_url(request) == expected


@pytest.mark.parametrize(
    "path",
    [
        "x" * 256,
        "a%00b",
        "%0A",
        "a%0Ab",
        "a%0D",
        "%7F",
        "%C2%80",
        "%FF",
        "%ED%A0%80",
        "%2E",
        "%2E%2E",
    ],
)
async def test_what_is_no_id_in_a_path(path: str) -> None:
    request = await resolved(f"/v1/stream/{path}")
    with pytest.raises(ApiError) as raised:
        conversation_id_in_url(request)
    assert reason_of(raised) == "invalid_conversation_id"


async def test_the_id_in_the_query() -> None:
    request = await resolved("/v1/stream?conv_id=a%2Fb+c&from=1")
    assert conversation_id_in_url(request) == "a/b c"


@pytest.mark.parametrize(
    "query", ["", "conv_id=", "conv_id=a&conv_id=a", "conv_id=a&conv_id=b", "conv_id=%FF"]
)
async def test_what_is_no_id_in_the_query(query: str) -> None:
    request = await resolved(f"/v1/stream?{query}")
    with pytest.raises(ApiError) as raised:
        conversation_id_in_url(request)
    assert reason_of(raised) == "invalid_conversation_id"


@pytest.mark.parametrize(
    ("header", "query", "expected"),
    [
        (None, "", None),
        ("", "", None),
        (None, "?conv_id=", None),
        ("a/b::m", "", "a/b::m"),
        ("grüße", "", "grüße"),
        ("a%2Fb", "", "a%2Fb"),  # raw: nothing is decoded in a header
        (None, "?conv_id=gr%C3%BC%C3%9Fe", "grüße"),
        ("a", "?conv_id=", "a"),
        ("", "?conv_id=a", "a"),
        ("a", "?conv_id=a", "a"),
    ],
)
def test_the_id_of_a_post(header: str | None, query: str, expected: str | None) -> None:
    headers = {} if header is None else {"X-Conversation-Id": header}
    assert conversation_id_of_post(make_mocked_request("POST", POST + query, headers)) == expected


@pytest.mark.parametrize(
    ("header", "query"),
    [("a", "?conv_id=b"), (None, "?conv_id=a&conv_id=b"), (".", ""), ("x" * 256, "")],
)
def test_what_is_no_id_of_a_post(header: str | None, query: str) -> None:
    headers = {} if header is None else {"X-Conversation-Id": header}
    with pytest.raises(ApiError) as raised:
        conversation_id_of_post(make_mocked_request("POST", POST + query, headers))
    assert reason_of(raised) == "invalid_conversation_id"


# --- the body


@pytest.mark.parametrize("parsed", [{}, {"a": 1}, {"stream": True, "ü": [None, 1.5, {"b": "c"}]}])
def test_a_json_object_is_a_body(parsed: dict[str, Any]) -> None:
    assert parse_json_object(orjson.dumps(parsed)) == parsed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b"[{}]",
        b"{",
        b"{'a': 1}",
        b"{a: 1}",
        b'{"a": 1,}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 01}',
        b'{"a": 1} x',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\n"}',
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda body: ascii(body)[:30],
)
def test_anything_else_is_an_invalid_body(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parse_json_object(body)
    assert (reason_of(raised), raised.value.status) == ("invalid_body", 400)
