"""What a client raises.

::

    ClientError
    ├── UnreachableError       no connection, or lost again and again for give_up_after_s
    ├── NotPyserveError        something answers there, but it is not a pyserve
    └── AnswerError            the server said no: status, reason, message, figures
        ├── GoneError          404: no such stream; it never was, expired or was stopped
        ├── ReplacedError      409: a newer stream took its place
        ├── ActiveError        409: on_conflict="reject", and the conversation has a live stream
        ├── OffsetLostError    400: the bytes from there on are no longer kept
        ├── NotAllowedError    401, 403
        └── UnavailableError   408, 425, 429, 5xx; raised when it lasts for give_up_after_s, or
                               answers a POST without saying when to come back

:mod:`pyserve.client.rules` tells which are raised at once, and which only when they last.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from pyserve.errors import PyserveError


class ClientError(PyserveError):
    """The root of what a client raises."""


class UnreachableError(ClientError):
    """The server cannot be reached, or the connection was lost and did not come back in time."""

    #: Nothing was ever heard from there: a wrong address rather than an outage.
    first_contact = False


class NotPyserveError(ClientError):
    """What answers there is not a pyserve (or a proxy answers in its place)."""


class AnswerError(ClientError):
    """The server refused. ``status`` is HTTP's, ``reason`` one of pyserve's words, ``figures`` what
    stands beside it, such as ``first_offset``."""

    def __init__(self, status: int, reason: str, message: str, **figures: Any) -> None:
        super().__init__(f"{message} ({reason})" if reason else message)
        self.status = status
        self.reason = reason
        self.message = message
        self.figures = figures
        self.retry_after_s: float | None = None


class GoneError(AnswerError):
    """There is no such stream (any more). After a restart of the server there is none at all."""


class ReplacedError(AnswerError):
    """A newer stream has taken the conversation; ``figures["epoch"]`` names it."""


class ActiveError(AnswerError):
    """The conversation has a live stream, and the request said not to replace it."""


class OffsetLostError(AnswerError):
    """The log's cap has pushed the wanted bytes out."""

    @property
    def first_offset(self) -> int:
        """The oldest byte that can still be read."""
        return int(self.figures["first_offset"])


class NotAllowedError(AnswerError):
    """Credentials are missing or wrong, or the origin is not allowed."""


class UnavailableError(AnswerError):
    """Too much to do, still loading, no upstream, or a gateway's trouble; for longer than the
    client would wait."""


def is_passing_status(status: int) -> bool:
    """Whether the same request may fare better later."""
    return status in (408, 425, 429) or status >= 500


# A generation that fails so is not unavailable, whatever the status.
_LASTING_REASONS = {"upstream_auth", "upstream_invalid", "upstream_not_sse", "event_too_large"}
_ERRORS_BY_REASON: dict[str, type[AnswerError]] = {
    "stream_not_found": GoneError,
    "stream_replaced": ReplacedError,
    "replaced": ReplacedError,
    "epoch_mismatch": ReplacedError,
    "session_active": ActiveError,
    "offset_lost": OffsetLostError,
    **dict.fromkeys(_LASTING_REASONS, AnswerError),
}


def _kind_of(status: int, reason: str) -> type[AnswerError] | None:
    """The class for an answer; None if nothing in it is known."""
    if reason in _ERRORS_BY_REASON:
        return _ERRORS_BY_REASON[reason]
    if status in (401, 403):
        return NotAllowedError
    if reason and status == 500:  # a failure that is named; from a proxy it is a passing one
        return AnswerError
    if is_passing_status(status):
        return UnavailableError
    return AnswerError if reason else None


def replaced_error(epoch: str) -> ReplacedError:
    """The conversation is now the stream `epoch`'s."""
    message = "The stream was replaced by a newer one"
    return ReplacedError(409, "stream_replaced", message, epoch=epoch)


def gone_error() -> GoneError:
    """As the server says it."""
    return GoneError(404, "stream_not_found", "Stream not found or expired")


def answer_error(
    base_url: str, status: int, retry_after: str, location: str, body: bytes
) -> AnswerError | NotPyserveError:
    """The error that an answer tells: pyserve's own, or a proxy's with a status that speaks for
    itself; anything else is no pyserve."""
    told = _parse_error(body)
    reason = told.pop("reason", "")
    kind = _kind_of(status, reason)
    if kind is None:
        where = f" ({location})" if location else ""
        return NotPyserveError(f"{base_url} answers {status}{where}: not a pyserve")
    message = told.pop("message", f"{base_url} answers {status}")
    error = kind(status, reason, message, **told)
    if re.fullmatch(r"[0-9]{1,6}", retry_after):
        error.retry_after_s = float(retry_after)
    return error


def _parse_error(body: bytes) -> dict[str, Any]:
    """The ``error`` object of an answer in pyserve's shape, else empty."""
    try:
        told = orjson.loads(body)["error"]
        shaped = isinstance(told["reason"], str) and isinstance(told["message"], str)
    except (ValueError, TypeError, KeyError, IndexError):
        return {}
    return {name: told[name] for name in told if name not in ("code", "status")} if shaped else {}
