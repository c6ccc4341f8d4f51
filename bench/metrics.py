"""What is told about a run, and how runs become one figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from points import Point

Run = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One figure of a run; None where the run does not tell it. Less is better."""

    key: str
    title: str
    of: Callable[[Run, Point], float | None]


def _at(name: str, quantile: str, scale: float = 1.0) -> Callable[[Run, Point], float | None]:
    def of(run: Run, _point: Point) -> float | None:
        told = run.get(name)
        return None if told is None else told[quantile] * scale

    return of


def _per_reader(run: Run, point: Point) -> float:
    return float(run["cpu_s"] * 1e3 / (point.readers * point.batches))


def _cpu_us(run: Run, _point: Point) -> float:
    return float(run["cpu_s"] * 1e6 / run["events"])


def _delivery_us(run: Run, _point: Point) -> float | None:
    if not run.get("delivery_events"):
        return None
    return float(run["delivery_cpu_s"] * 1e6 / run["delivery_events"])


DELIVERY = Metric("delivery_us_per_event", "delivery alone µs/event", _delivery_us)
CPU = Metric("cpu_us_per_event", "CPU µs/event", _cpu_us)
CPU_READER = Metric("cpu_ms_per_reader", "CPU ms/reader", _per_reader)
LATENCY = [
    Metric("latency_p50_ms", "latency p50 ms", _at("latency_us", "p50", 1e-3)),
    Metric("latency_p99_ms", "p99 ms", _at("latency_us", "p99", 1e-3)),
]
LAG = Metric("lag_p99_ms", "loop lag p99 ms", _at("lag_ms", "p99"))
ELAPSED = Metric("elapsed_ms", "all events after ms", lambda run, _: run["seconds"] * 1e3)
BATCH = Metric("batch_ms", "all read after ms", _at("batch_us", "p50", 1e-3))
FIRST_BYTE = [
    Metric("first_byte_p50_ms", "first byte p50 ms", _at("first_byte_us", "p50", 1e-3)),
    Metric("first_byte_p99_ms", "p99 ms", _at("first_byte_us", "p99", 1e-3)),
]
FIRST_TOKEN = [
    Metric("first_token_p50_ms", "first token p50 ms", _at("first_event_us", "p50", 1e-3)),
    Metric("first_token_p99_ms", "p99 ms", _at("first_event_us", "p99", 1e-3)),
]
LIGHT_OWNER = [
    Metric(
        "light_first_token_p50_ms", "light: first token p50 ms", _at("light_first_token_ms", "p50")
    ),
    Metric("light_first_token_p99_ms", "p99 ms", _at("light_first_token_ms", "p99")),
    Metric("light_first_token_max_ms", "max ms", _at("light_first_token_ms", "max")),
]
HEAVY_OWNER = [
    Metric(
        "heavy_first_token_p50_ms", "heavy: first token p50 ms", _at("heavy_first_token_ms", "p50")
    ),
    Metric("heavy_done_ms", "all done after ms", lambda run, _: run["seconds"] * 1e3),
]
TOKEN = Metric("token_us", "µs between tokens", _at("event_gap_us", "p50"))
MEMORY = Metric(
    "rss_kib_per_reader",
    "KiB/reader",
    lambda run, point: run["rss_attached_bytes"] / 1024 / point.readers,
)
DESCRIPTORS = Metric(
    "descriptors_per_reader",
    "descriptors/reader",
    lambda run, point: run["descriptors_attached"] / point.readers,
)

_OF_WAY = {
    "live": [CPU, *LATENCY, LAG],
    "replay": [BATCH, CPU_READER, *FIRST_BYTE],
    "reattach": [*FIRST_BYTE, CPU_READER],
    "generate": [*FIRST_TOKEN, TOKEN, CPU],
    "owners": [*LIGHT_OWNER, *HEAVY_OWNER],
}


def metrics_of(point: Point) -> list[Metric]:
    """What is told of a point; the first is what it is about."""
    metrics = list(_OF_WAY[point.way])
    if point.has_delivery_alone:
        metrics.insert(0, DELIVERY)
    if point.group == "burst":
        metrics.insert(1, ELAPSED)
    if point.readers >= 1000:
        metrics += [MEMORY, DESCRIPTORS] if point.group == "crowd" else [MEMORY]
    return metrics


def summary(point: Point, rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """The median of each figure; for all but the first server also ``first_over_it``, the median
    of how many times the first one's figure of the same round is this one's."""
    servers: dict[str, Any] = {}
    first = point.servers[0]
    for name in point.servers:
        servers[name] = {}
        for metric in metrics_of(point):
            pairs = [
                (metric.of(each[first], point), metric.of(each[name], point)) for each in rounds
            ]
            values = [value for _, value in pairs if value is not None]
            if not values:
                continue
            told = {"median": statistics.median(values), "least": min(values), "most": max(values)}
            ratios = [base / value for base, value in pairs if base is not None and value]
            if name != first and ratios:
                told["first_over_it"] = statistics.median(ratios)
            servers[name][metric.key] = told
    return servers
