"""Any OpenAI-compatible server over HTTP, as a source of streams and behind a strict proxy.

Bytes are taken as they come, in whole blocks, and never looked at line by line here: the core's
framer does that. Connections are not reused: llama.cpp closes a kept one after 100 requests or 5
idle seconds, and a POST that meets this moment would fail although nothing is wrong.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
import orjson
from yarl import URL

from pyserve.config import Config
from pyserve.errors import ApiError, Dialect
from pyserve.producers.idle import IdleWatch

log = logging.getLogger("pyserve")

# An error page is read no further than this; a message of it is passed on no longer than that.
_MAX_ERROR_BODY_BYTES = 64 * 1024
_MAX_ERROR_MESSAGE_CHARS = 2000
_ERROR_BODY_TIMEOUT_S = 1.0
_HEALTH_TIMEOUT_S = 2.0
# llama.cpp's /props holds the chat template, some tens of kilobytes.
_MAX_PROPS_BYTES = 4 * 1024 * 1024
_MAX_RETRY_AFTER_S = 24 * 3600

# What may mean that the upstream is gone.
_LOSSES = ("upstream_unreachable", "upstream_lost")

#: Logs what went wrong, and makes the error that tells of it.
Report = Callable[[str, BaseException], ApiError]


@dataclass(frozen=True)
class Route:
    """A route that generates: how its streams end and how they tell an error."""

    path: str
    is_terminator: Callable[[bytes], bool]
    dialect: Dialect = "openai"


def _done(event: bytes) -> bool:
    return event.startswith((b"data: [DONE]", b"data:[DONE]"))


def _response_over(event: bytes) -> bool:
    # A response that failed or was cut short ends in its own words.
    return _has_kind(event, b"response.completed", b"response.incomplete", b"response.failed")


def _message_over(event: bytes) -> bool:
    return _has_kind(event, b"message_stop")


def _has_kind(event: bytes, *kinds: bytes) -> bool:
    # Within a JSON string the quotes have backslashes: no text that was generated looks like this.
    return any(b"event: " + kind + b"\n" in event or b'"type":"' + kind in event for kind in kinds)


GENERATION_ROUTES = [
    Route("/v1/chat/completions", _done),
    Route("/v1/completions", _done),
    # llama.cpp's own route sends no [DONE]: its last event says so itself (tried with b11549).
    Route("/completion", lambda event: b'"stop":true' in event),
    Route("/v1/responses", _response_over),
    Route("/v1/messages", _message_over, dialect="anthropic"),
]


class Sink(Protocol):
    """Where a stream goes: a session, or what makes something else of it."""

    def append(self, sse: bytes, /) -> None:
        """Take SSE text, split anywhere."""

    def end_input(self) -> None:
        """There is no more."""

    def last_event(self) -> bytes:
        """The newest whole event, ``b""`` if there is none."""


class Upstream:
    """One upstream server. :meth:`open` before the first use, :meth:`close` after the last."""

    def __init__(
        self, locate: Callable[[], str | None], config: Config, key: str | None = None
    ) -> None:
        """`locate` gives the server's URL, or None while it is being started again."""
        #: Called when a connection could not be made or was lost, to look what is the matter.
        self.on_loss: Callable[[], None] = lambda: None
        self._locate = locate
        self._config = config
        self._headers = {}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._http: aiohttp.ClientSession

    async def open(self) -> None:
        """Make the HTTP client; needs the running loop."""
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._config.upstream_connect_timeout_s
            ),
            auto_decompress=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: io.BytesIO | None = None,
        *,
        as_is: bool = False,
        is_probe: bool = False,
    ) -> AsyncIterator[Answer]:
        """One request, entered when a 2xx head has come; the connection is closed on leaving,
        whatever is left of the answer. `path` is percent-encoded and may have a query. `body` is
        closed, and its memory free, when the answer has begun.

        `as_is` is for who passes on the head, too: a 304 is an answer like any, and the body comes
        in an encoding that the `headers` accept. `is_probe` is for a look at the upstream's health:
        what fails is no news then.

        Raises:
            ApiError: for every failure of the upstream, its error statuses included.
        """
        first_byte_timeout_s = self._config.upstream_first_byte_timeout_s
        level = logging.DEBUG if is_probe else logging.WARNING

        def report(reason: str, error: BaseException) -> ApiError:
            """The full story goes to the log; the client gets the reason's fixed words."""
            log.log(level, "%s: %s: %s", reason, type(error).__name__, error)
            if reason in _LOSSES and not is_probe:
                self.on_loss()
            return ApiError(reason)

        try:
            async with asyncio.timeout(first_byte_timeout_s) as deadline:
                response = await self._request(method, path, headers, body, report)
                try:
                    if not (as_is and response.status == 304):
                        await _raise_for_status(response, level)
                    if not as_is:
                        _raise_for_encoding(response)
                    if body is not None:
                        body.close()
                    idle = IdleWatch(deadline, self._config.upstream_idle_timeout_s)
                    with closing(idle):
                        yield Answer(response, deadline, idle, report)
                finally:
                    response.close()
        except TimeoutError as error:
            raise report("upstream_timeout", error) from error

    async def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: io.BytesIO | None,
        report: Report,
    ) -> aiohttp.ClientResponse:
        # The routes begin with /v1: take the form that OpenAI's SDKs want, too.
        base_url = (self._locate() or "").rstrip("/").removesuffix("/v1")
        if not base_url:
            raise ApiError("model_loading", retry_after_s=1)
        try:
            return await self._http.request(
                method,
                URL(base_url + path, encoded=True),
                headers={"Accept-Encoding": "identity", **headers, **self._headers},
                # From a file aiohttp sends a large body in pieces, so that the loop isn't held up.
                data=body,
                allow_redirects=False,
            )
        except aiohttp.ServerTimeoutError as error:
            raise report("upstream_timeout", error) from error
        except aiohttp.ClientConnectorError as error:
            raise report("upstream_unreachable", error) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise report("upstream_lost", error) from error
        except (aiohttp.ClientError, ValueError) as error:  # a head that isn't HTTP
            raise report("upstream_invalid", error) from error

    async def generate(
        self,
        route: Route,
        headers: Mapping[str, str],
        body: io.BytesIO,
        session: Sink,
        begin: Callable[[], None],
    ) -> str | None:
        """Stream one generation into `session`; `begin` is called when the upstream has agreed.

        Returns:
            None, or ``unterminated`` when the stream ended without its route's terminator.

        Raises:
            ApiError: for every failure of the upstream.
        """
        try:
            async with self.exchange("POST", route.path, headers, body) as answer:
                if answer.content_type != "text/event-stream":
                    log.warning("upstream answered %r, not a stream", answer.content_type)
                    raise ApiError("upstream_not_sse")
                begin()
                while block := await answer.read_block():
                    session.append(block)
        except ApiError:
            # Once all is said, how the connection ends doesn't matter.
            if not route.is_terminator(session.last_event()):
                raise
            return None
        session.end_input()
        return None if route.is_terminator(session.last_event()) else "unterminated"

    async def ask_health(self) -> ApiError | None:
        """What ails it, None if nothing does: it answers ``GET /health``, or where it has none
        ``GET /v1/models``. A server that knows neither route is there, too."""
        for path in ("/health", "/v1/models"):
            try:
                async with (
                    asyncio.timeout(_HEALTH_TIMEOUT_S),
                    self.exchange("GET", path, {}, is_probe=True),
                ):
                    return None
            except TimeoutError:
                return ApiError("upstream_timeout")
            except ApiError as error:
                if error.status >= 500:
                    return error
        return None

    async def read_total_slots(self) -> int | None:
        """How many generations llama.cpp runs at once; None where nothing tells."""
        props = await self._read_json("/props")
        slots = props.get("total_slots") if isinstance(props, dict) else None
        return slots if isinstance(slots, int) and slots > 0 else None

    async def _read_json(self, path: str) -> Any:
        """The parsed answer; None where there is none, or not in the time of a health check."""
        body = b""
        try:
            async with (
                asyncio.timeout(_HEALTH_TIMEOUT_S),
                self.exchange("GET", path, {}, is_probe=True) as answer,
            ):
                while len(body) < _MAX_PROPS_BYTES and (block := await answer.read_block()):
                    body += block
            return orjson.loads(body)
        except (TimeoutError, ApiError, orjson.JSONDecodeError):
            return None

    async def warm_up(self, model: str, prompt: str) -> None:
        """Generate one token.

        Raises:
            ApiError: it cannot.
        """
        question = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "stream": False,
        }
        headers = {"Content-Type": "application/json"}
        body = io.BytesIO(orjson.dumps(question))
        async with self.exchange("POST", "/v1/chat/completions", headers, body) as answer:
            told = b""
            while block := await answer.read_block():
                told += block
        if b'"choices"' not in told:
            raise ApiError("upstream_invalid")


class Answer:
    """An upstream's answer whose head has come, with its body under the time limits."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        first_byte: asyncio.Timeout,
        idle: IdleWatch,
        report: Report,
    ) -> None:
        self._response = response
        self._first_byte: asyncio.Timeout | None = first_byte
        self._idle = idle
        self._report = report
        self.status = response.status
        self.headers = response.headers
        self.content_type = response.content_type

    async def read_block(self) -> bytes:
        """What has come, at least a byte; ``b""`` at the end.

        Raises:
            ApiError: reason ``upstream_lost``. Silence cancels the whole exchange.
        """
        if self._first_byte is None:
            self._idle.begin_wait()
        try:
            block = await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._report("upstream_lost", error) from error
        # What the caller does with it is not the upstream's time.
        self._idle.end_wait()
        if self._first_byte is not None:
            self._first_byte.reschedule(None)
            self._first_byte = None
        return block


async def _raise_for_status(response: aiohttp.ClientResponse, level: int) -> None:
    """Do nothing for a 2xx.

    Raises:
        ApiError: the upstream's error in pyserve's shape: its status and its JSON message, never a
            raw page; 502 for a redirect and for credentials that it refused.
    """
    status = response.status
    if 200 <= status < 300:
        return
    if status < 400 or status > 599:
        log.log(level, "upstream answered with status %d to %s", status, response.url.path)
        raise ApiError("upstream_invalid")
    told = await _read_error(response)
    log.log(level, "upstream answered %d to %s: %.2000r", status, response.url.path, told)
    if status in (401, 403):
        raise ApiError("upstream_auth")
    message = told.get("message")
    if not isinstance(message, str):
        message = f"The upstream answered with status {status}"
    message = message[:_MAX_ERROR_MESSAGE_CHARS]
    if told.get("type") == "exceed_context_size_error" or told.get("code") == (
        "context_length_exceeded"
    ):
        counts = {name: told[name] for name in ("n_prompt_tokens", "n_ctx") if name in told}
        raise ApiError("context_overflow", message, status=status, **counts)
    if status == 503 and told.get("type") == "unavailable_error":
        raise ApiError("model_loading", retry_after_s=_retry_after_s(response) or 1)
    figures = {
        f"upstream_{name}": told[name]
        for name in ("type", "code", "param")
        if isinstance(told.get(name), (str, int))
    }
    raise ApiError(
        "upstream_error",
        message,
        status=status,
        retry_after_s=_retry_after_s(response),
        **figures,
    )


def _raise_for_encoding(response: aiohttp.ClientResponse) -> None:
    """We asked for plain bytes, and pass on what comes: packed ones would be taken for text."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        log.warning("upstream answered in %.100r although asked not to", encoding)
        raise ApiError("upstream_invalid")


async def _read_error(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The ``error`` object of a JSON answer, empty if there is none that can be understood."""
    body = b""
    try:
        async with asyncio.timeout(_ERROR_BODY_TIMEOUT_S):
            while len(body) < _MAX_ERROR_BODY_BYTES and (block := await response.content.readany()):
                body += block
        parsed = orjson.loads(body)
    except (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError):
        return {}
    told = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(told, str):
        return {"message": told}
    return told if isinstance(told, dict) else {}


def _retry_after_s(response: aiohttp.ClientResponse) -> int | None:
    """Its ``Retry-After`` if that is a sane number of seconds."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit() and int(text[:9]) <= _MAX_RETRY_AFTER_S:
        return int(text[:9])
    return None
