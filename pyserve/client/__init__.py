"""Read, start and stop pyserve's streams from Python, through drops of the connection.

::

    async with Client("http://127.0.0.1:8000") as client:
        stream = client.submit({"messages": [{"role": "user", "content": "Hi"}]})
        async for event in stream:
            print(event.data)
        print(stream.state, stream.reason)      # completed None

What an iteration promises: every event once, in order, from where it began to the end of the
generation; or an exception that says why not. A connection that breaks, a body that ends before the
stream does, and silence (the server sends a heartbeat each second) are losses: the client attaches
again where it was, after a pause that doubles with each failure and is random in part, so that a
thousand readers don't come back in the same instant. Leaving never stops a generation.
"""

from pyserve.client.client import Client
from pyserve.client.errors import (
    ActiveError,
    AnswerError,
    ClientError,
    GoneError,
    NotAllowedError,
    NotPyserveError,
    OffsetLostError,
    ReplacedError,
    UnavailableError,
    UnreachableError,
)
from pyserve.client.lookup import StreamInfo
from pyserve.client.sse import Event
from pyserve.client.streams import ByteStream, Connection, EventStream, Gap

__all__ = [
    "ActiveError",
    "AnswerError",
    "ByteStream",
    "Client",
    "ClientError",
    "Connection",
    "Event",
    "EventStream",
    "Gap",
    "GoneError",
    "NotAllowedError",
    "NotPyserveError",
    "OffsetLostError",
    "ReplacedError",
    "StreamInfo",
    "UnavailableError",
    "UnreachableError",
]
