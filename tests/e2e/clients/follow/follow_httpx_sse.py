"""PyPI `httpx-sse`: parses; asking again is up to its user, as its own README says."""

import json
import sys
import time

import httpx
from httpx_sse import connect_sse


def main(url: str) -> None:
    last_event_id = ""
    retry_s = 1.0
    # Heartbeats come each second, so a silence of five means that the connection is lost.
    with httpx.Client(timeout=httpx.Timeout(5.0)) as client:
        while True:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            try:
                with connect_sse(client, "GET", url, headers=headers) as source:
                    status = source.response.status_code
                    if status == 200:
                        for event in source.iter_sse():
                            tell(id=event.id, data=event.data)
                            last_event_id = event.id
                            if event.retry is not None:
                                retry_s = event.retry / 1000
                # The end of a whole answer is the end.
                return tell(end=status)
            except httpx.TransportError:
                time.sleep(retry_s)


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


main(sys.argv[1])
