"""What streams there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from pyserve.client.errors import NotPyserveError
from pyserve.client.transport import Request


@dataclass(frozen=True)
class StreamInfo:
    """What a lookup tells about a stream. Times are Unix seconds."""

    conversation_id: str
    #: ``queued``, ``streaming``, ``completed``, ``failed`` or ``cancelled``
    state: str
    reason: str | None
    epoch: str
    first_offset: int
    end_offset: int
    readers: int
    started_at: int
    #: None while it is live
    completed_at: int | None

    @property
    def is_live(self) -> bool:
        """Whether more may come."""
        return self.state in ("queued", "streaming")


def lookup_request(conversation_ids: list[str]) -> Request:
    """Asks for the streams there are of these conversations."""
    return Request(
        "POST",
        "/v1/streams/lookup",
        headers={"Content-Type": "application/json"},
        body=orjson.dumps({"conversation_ids": conversation_ids}),
    )


def parse_lookup(base_url: str, body: bytes) -> list[StreamInfo]:
    """The answer's streams.

    Raises:
        NotPyserveError: it is something else.
    """
    try:
        return [_stream_info(told) for told in orjson.loads(body)]
    except (ValueError, TypeError, KeyError) as error:
        raise NotPyserveError(f"{base_url} is not a pyserve") from error


def _stream_info(told: dict[str, Any]) -> StreamInfo:
    return StreamInfo(
        conversation_id=told["conversation_id"],
        state=told["state"],
        reason=told["reason"],
        epoch=told["epoch"],
        first_offset=told["first_offset"],
        end_offset=told["total_bytes"],
        readers=told["readers"],
        started_at=told["started_at"],
        completed_at=told["completed_at"] or None,
    )
