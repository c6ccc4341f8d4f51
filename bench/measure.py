"""One run of one server at one point; the same way for all of them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from points import LEFT_BEHIND, Point
from processes import Contestant, findings_of, read_streams

Run = dict[str, Any]

_LEAVE_TIMEOUT_S = 2.0


def run_once(contestant: Contestant, point: Point) -> Run:
    """One run; where the point asks for it, a second one with a single reader.

    Raises:
        BenchError: a reader did not get every byte, or a server died.
    """
    run = _run(contestant, point)
    if point.has_delivery_alone:
        single = _run(contestant, dataclasses.replace(point, readers=1))
        run["delivery_cpu_s"] = run["cpu_s"] - single["cpu_s"]
        run["delivery_events"] = run["events"] - single["events"]
    return run


def _run(contestant: Contestant, point: Point) -> Run:
    """Measure from the first event on where readers attach before it, else from the first
    connect."""
    options = _client_options(point) + contestant.prepare(point)
    before = _look(contestant)
    start = before
    with read_streams("--port", contestant.port, *options) as client:
        if point.way == "live":
            client.read_line("^attached")
            start = _look(contestant)
            contestant.go()
        found = findings_of(client)
    end = _look(contestant)
    told = contestant.finish()
    return {
        **found,
        **told,
        "cpu_s": end["cpu_s"] - start["cpu_s"],
        "rss_attached_bytes": start["rss_bytes"] - contestant.idle_rss_bytes,
        "descriptors_attached": start["descriptors"] - before["descriptors"],
        "descriptors_left": _descriptors_left(contestant, before["descriptors"]),
    }


def _client_options(point: Point) -> list[object]:
    options = {
        "--readers": point.readers,
        "--streams": point.streams,
        "--batches": point.batches,
        "--stalled": point.stalled_share,
    }
    if point.way == "reattach":
        options |= {"--first-seq": point.events - LEFT_BEHIND, "--leave-after": LEFT_BEHIND}
    elif point.way != "generate":
        options |= {"--events": point.events}
    return [word for pair in options.items() for word in pair]


def _look(contestant: Contestant) -> dict[str, float]:
    return {
        name: sum(getattr(program, name) for program in contestant.measured)
        for name in ("cpu_s", "rss_bytes", "descriptors")
    }


def _descriptors_left(contestant: Contestant, before: float) -> float:
    """How many more it holds than before the readers came, a moment after they have left."""
    deadline = time.monotonic() + _LEAVE_TIMEOUT_S
    while (left := _look(contestant)["descriptors"] - before) > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    return left
