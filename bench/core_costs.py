"""What the core costs by itself: natively, through its bindings, and in memory.

python bench/core_costs.py growth SESSIONS    one part, in a process of its own: a line of JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from events import make_event
from processes import BENCH, PROGRAMS, Program, rss_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

    import pyserve

Row = dict[str, Any]

_NATIVE_TITLES = {
    "append_copy": "one event: memcpy, the least it can cost",
    "append_ring": "one event into the ring",
    "append_erase_front": "one event into a full vector that is erased from the front (llama.cpp)",
    "framer/1": "one event framed and numbered",
    "session_append/1": "one event into a session: framed, numbered, appended, announced",
    "session_append/64": "the same, 64 events at a time",
    "session_read": "reading a log, a KiB of it: nothing is copied",
    "create_and_evict": "a session made and dropped beside 100,000 others",
}

_SESSION_COUNTS = (1_000, 10_000, 100_000)


def _row(name: str, title: str, value: float, unit: str) -> Row:
    return {"name": name, "title": title, "value": value, "unit": unit}


def native() -> list[Row]:
    """bench/core_bench.cpp, where it was built."""
    program = PROGRAMS / "core_bench"
    if not program.exists():
        return []
    with Program(program, "--benchmark_format=json", "--benchmark_min_time=0.2") as bench:
        told = json.loads(bench.read_to_end())
    rows = []
    for each in told["benchmarks"]:
        name = each["name"]
        if "bytes_per_second" in each:
            nanoseconds = 1024e9 / each["bytes_per_second"]
        else:
            nanoseconds = 1e9 / each["items_per_second"] if "items_per_second" in each else None
        nanoseconds = nanoseconds or each["cpu_time"]
        if name in _NATIVE_TITLES:
            rows.append(_row(name, _NATIVE_TITLES[name], nanoseconds, "ns"))
    return rows


def _each_ns(work: Callable[[], object], times: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(times):
        work()
    return (time.perf_counter_ns() - start) / times


def _manager() -> pyserve.StreamSessionManager:
    import pyserve

    return pyserve.StreamSessionManager(pyserve.Config(max_session_bytes=4 << 20))


def bindings(times: int) -> list[Row]:
    """The same from Python, one call for each event."""
    manager = _manager()
    session = manager.create_or_replace("bench")
    event = make_event(0)
    append_ns = _each_ns(lambda: session.append(event), times)

    def read_all() -> None:
        reader = session._core.attach(session.dropped_prefix)
        while reader.read(64 * 1024):
            pass

    read_ns = _each_ns(read_all, 20) / (4 << 10)
    return [
        _row("python_append", "one event appended from Python", append_ns, "ns"),
        _row("python_read", "reading a log from Python, a KiB of it", read_ns, "ns"),
    ]


def growth(sessions: int) -> list[Row]:
    """So many live sessions: idle, then with some events, then ended."""
    manager = _manager()
    event = make_event(0)
    before = rss_bytes()
    numbers = iter(range(sessions))
    kept: list[pyserve.StreamSession] = []
    create_ns = _each_ns(
        lambda: kept.append(manager.create_or_replace(f"{next(numbers)}")), sessions
    )
    idle_bytes = (rss_bytes() - before) / sessions
    for session in kept:
        for _ in range(4):
            session.append(event)
    live_bytes = (rss_bytes() - before) / sessions
    tick_ms = _each_ns(manager._core.tick, 3) / 1e6
    get_ns = _each_ns(lambda: manager.get("5"), 10_000)
    name, among = f"{sessions}", f"of {sessions:,} sessions"
    return [
        _row(f"create_{name}", f"creating each {among}, from Python", create_ns / 1e3, "µs"),
        _row(f"get_{name}", f"finding one {among}, from Python", get_ns / 1e3, "µs"),
        _row(f"idle_{name}", f"memory of each {among}, empty", idle_bytes, "bytes"),
        _row(f"live_{name}", f"memory of each {among}, four events in it", live_bytes, "bytes"),
        _row(f"tick_{name}", f"one round of heartbeats and collection {among}", tick_ms, "ms"),
    ]


def measure(progress: Progress, share: float) -> list[Row]:
    """All of it."""
    parts = [("native", 0), ("bindings", int(200_000 * share) + 1)]
    parts += [("growth", int(count * share)) for count in _SESSION_COUNTS]
    task = progress.add_task("core", total=len(parts))
    rows: list[Row] = []
    for part, count in parts:
        progress.update(task, description=f"core: {part} {count or ''}")
        if part == "native":
            rows += native()
        else:
            with Program(BENCH / "core_costs.py", part, count, python=True) as program:
                rows += json.loads(program.read_to_end())
        progress.advance(task)
    progress.update(task, description="core")
    return rows


if __name__ == "__main__":
    print(json.dumps({"bindings": bindings, "growth": growth}[sys.argv[1]](int(sys.argv[2]))))
