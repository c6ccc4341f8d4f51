"""One request and its answer; when to try again."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import aiohttp
from yarl import URL

from pyserve.client.errors import AnswerError, ClientError, UnreachableError, answer_error
from pyserve.client.rules import When, is_passing

#: Headers for one request; called anew for each, with the conversation id that it is about (None
#: for a lookup), so that a token may be short-lived.
Authorize = Callable[[str | None], Mapping[str, str] | Awaitable[Mapping[str, str]]]

_MAX_ERROR_BODY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """The times of a client, in seconds; see :class:`pyserve.client.Client`."""

    stall_timeout_s: float | None
    answer_timeout_s: float
    give_up_after_s: float
    first_delay_s: float
    max_delay_s: float


@dataclass(frozen=True)
class Request:
    """What is sent; again and again the same, where it must be."""

    method: str
    path: str
    conversation_id: str | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None

    def url(self, base_url: str) -> URL:
        """Where to. The id stands in the query: in a path, proxies take slashes and dots apart."""
        query = dict(self.query)
        if self.conversation_id is not None:
            query["conv_id"] = self.conversation_id
        pairs = "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())
        return URL(f"{base_url}{self.path}?{pairs}".rstrip("?"), encoded=True)


class Transport:
    """The HTTP side of a client."""

    def __init__(
        self,
        base_url: str,
        limits: Limits,
        headers: Mapping[str, str],
        authorize: Authorize | None,
        session: aiohttp.ClientSession | None,
    ) -> None:
        self.base_url = _checked_url(base_url)
        self.limits = limits
        self._headers = headers
        self._authorize = authorize
        self._session = session
        self._owns_session = session is None
        self._had_answer = False
        self._closed = asyncio.Event()

    async def close(self) -> None:
        """Close the connections, unless they are the caller's."""
        self._closed.set()
        if self._owns_session and self._session is not None:
            await self._session.close()

    def require_open(self) -> None:
        """Refuse to go on after :meth:`close`.

        Raises:
            RuntimeError: the client is closed.
        """
        if self._closed.is_set():
            raise RuntimeError(f"this client of {self.base_url} is closed")

    def _http(self) -> aiohttp.ClientSession:
        self.require_open()
        if self._session is None:
            # Not reused: a kept connection may be closing just when a POST goes out on it.
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def send(self, request: Request) -> aiohttp.ClientResponse:
        """One try. Returns an answer with a 2xx head, whose body is the caller's to close.

        Raises:
            ClientError: anything else.
            RuntimeError: the client is closed.
        """
        headers = {**self._headers, **request.headers, "Accept-Encoding": "identity"}
        if self._authorize is not None:
            more = self._authorize(request.conversation_id)
            headers.update(await more if inspect.isawaitable(more) else more)
        try:
            async with asyncio.timeout(self.limits.answer_timeout_s):
                response = await self._http().request(
                    request.method,
                    request.url(self.base_url),
                    headers=headers,
                    data=request.body,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                )
                self._had_answer = True
                if response.status >= 300:
                    raise await self._answer_error(response)
                return response
        except (aiohttp.ClientError, OSError) as error:
            unreachable = UnreachableError(f"{self.base_url}: {cause(error)}")
            unreachable.first_contact = not self._had_answer and isinstance(
                error, aiohttp.ClientConnectorError
            )
            raise unreachable from error

    async def _answer_error(self, response: aiohttp.ClientResponse) -> ClientError:
        body = b""
        try:
            while len(body) < _MAX_ERROR_BODY_BYTES and (block := await response.content.readany()):
                body += block
        finally:
            response.close()
        head = response.headers
        return answer_error(
            self.base_url,
            response.status,
            head.get("Retry-After", ""),
            head.get("Location", ""),
            body,
        )

    async def fetch(self, request: Request) -> tuple[int, bytes]:
        """Send what may be sent twice, until it is answered: status and body.

        Raises:
            ClientError: the server refused, or the time to give up has come.
        """
        backoff = Backoff(self.limits)
        while True:
            try:
                return await self.fetch_once(request)
            except ClientError as error:
                delay_s = backoff.next_delay_s(error, "attach")
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._closed.wait()

    async def fetch_once(self, request: Request) -> tuple[int, bytes]:
        """One try: status and body.

        Raises:
            ClientError: it failed.
        """
        response = await self.send(request)
        return response.status, await self._read_whole(response)

    async def _read_whole(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            async with response, asyncio.timeout(self.limits.answer_timeout_s):
                return await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{self.base_url}: {cause(error)}") from error


class Backoff:
    """The pauses between tries, and when to stop trying."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.reset()

    def reset(self) -> None:
        """All is well again."""
        self._failures = 0
        self._failing_since: float | None = None
        self._asked_for_s = 0.0  # by the server, with Retry-After

    def next_delay_s(self, error: ClientError, when: When) -> float:
        """How long to wait before the next try.

        Raises:
            ClientError: `error` itself, where another try is no use or not in time.
        """
        if not is_passing(error, when):
            raise error
        limits = self._limits
        now = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now
        doubled_s = limits.first_delay_s * 2.0 ** min(self._failures, 60)  # so that it fits a float
        delay_s = min(limits.max_delay_s, doubled_s) * random.uniform(0.5, 1.0)
        if isinstance(error, AnswerError) and error.retry_after_s is not None:
            delay_s += error.retry_after_s
            self._asked_for_s += error.retry_after_s
        self._failures += 1
        # Pauses that the server asked for don't count, up to as much again.
        patience_s = limits.give_up_after_s + min(self._asked_for_s, limits.give_up_after_s)
        if now + delay_s > self._failing_since + patience_s:
            raise error
        return delay_s


def _checked_url(base_url: str) -> str:
    """The server's URL, ready to be followed by a path.

    Raises:
        ValueError: it is not one.
    """
    try:
        parts = urlsplit(base_url)
        host = (parts.hostname or "").encode("idna")
        is_url = bool(host) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # brackets, a port that is none, what no host's name may hold
        is_url = False
    if not is_url:
        raise ValueError(f"{base_url!r} is not an http:// or https:// URL")
    if parts.query or parts.fragment or parts.username:
        raise ValueError("a server's URL has no user, query or fragment")
    # Take the form that OpenAI's SDKs want, too.
    return base_url.rstrip("/").removesuffix("/v1")


def cause(error: BaseException) -> str:
    """A failure in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, ConnectionRefusedError):
            return "connection refused"
        return error.os_error.strerror or str(error)
    if isinstance(error, aiohttp.ClientPayloadError):  # its own words name a status that none sent
        return "the answer broke off"
    return str(error) or type(error).__name__
