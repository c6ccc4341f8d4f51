"""Measure pyserve beside what else could serve the same streams, in one run.

The servers of a point run side by side and take turns, round after round, so that a ratio holds on
a machine whose speed drifts. Every byte is checked at every reader; a wrong one ends the bench.

    python bench/run.py                       all of it: some minutes
    python bench/run.py fan-out --rounds 5    one group
    python bench/run.py burst-100 reattach    single points
    python bench/run.py --list                what there is

Results go to bench/results: a JSON file for each group, README.md with tables, pictures as SVG.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import batch_rates
import core_costs
import fairness_load
from contestants import SERVERS
from measure import run_once
from metrics import Run, summary
from points import OWN_GROUPS, POINTS, Point
from processes import BENCH, PROGRAMS, BenchError, Contestant
from report import write_report
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: How each of OWN_GROUPS is measured, with so many rounds and this share of the work.
MEASURE_OWN: dict[str, Callable[[Progress, int, float], list[dict[str, Any]]]] = {
    "batch": batch_rates.measure,
    "core": lambda progress, _, share: core_costs.measure(progress, share),
}
WARM_UP_SHARE = 0.1


def machine() -> dict[str, Any]:
    """Where it was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("pyserve", "aiohttp", "xllamacpp")},
    }


def chosen(words: Sequence[str]) -> list[Point]:
    """The points that are named, by themselves or by their group; all without a name."""
    known = {point.name for point in POINTS} | {point.group for point in POINTS} | {*OWN_GROUPS}
    if unknown := [word for word in words if word not in known]:
        sys.exit(f"no such point or group: {', '.join(unknown)}; --list tells them")
    return [point for point in POINTS if not words or {point.name, point.group} & set(words)]


def servers_of(point: Point) -> Point:
    """The point without servers that this system does not have."""
    if shutil.which("nginx"):
        return point
    servers = tuple(name for name in point.servers if name != "nginx")
    return dataclasses.replace(point, servers=servers)


def measure_point(point: Point, rounds: int, progress: Progress) -> dict[str, Any]:
    """All rounds of one point, and what they come to."""
    rounds = min(rounds, point.most_rounds)
    task = progress.add_task(point.name, total=rounds * len(point.servers))
    runs: list[dict[str, Run]] = []
    run: Callable[[Contestant, Point], Run]
    run = fairness_load.run_once if point.way == "owners" else run_once
    with ExitStack() as stack:
        servers = {name: stack.enter_context(SERVERS[name](point)) for name in point.servers}
        for server in servers.values():  # what is made at its first use, or not yet in a cache
            run(server, point.shortened(WARM_UP_SHARE))
        for _ in range(rounds):
            runs.append({})
            for name, server in servers.items():
                progress.update(task, description=f"{point.name}: {name}")
                runs[-1][name] = run(server, point)
                progress.advance(task)
    progress.update(task, description=point.name)
    return {**dataclasses.asdict(point), "summary": summary(point, runs), "runs": runs}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("points", nargs="*", metavar="POINT", help="a point or a group (default: all)")
    add("--rounds", type=int, default=2, help="turns of each server (default: %(default)s)")
    add("--share", type=float, default=1.0, help="of events and readers, to try it out")
    add("--results", type=Path, default=BENCH / "results", metavar="DIR")
    add("--list", action="store_true", help="tell the points and measure nothing")
    return parser.parse_args()


def _list() -> None:
    for point in POINTS:
        print(f"{point.group:10} {point.name:20} {point.title}")
    for group, title in OWN_GROUPS.items():
        print(f"{group:10} {group:20} {title}")


def main() -> None:
    options = _options()
    if options.list:
        _list()
        return
    points = [servers_of(each).shortened(options.share) for each in chosen(options.points)]
    if not (PROGRAMS / "load_client").exists():
        sys.exit("the programs are not built: `make bench` does it")
    columns = [TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn()]
    results: dict[str, Any] = {}
    try:
        with Progress(*columns, TimeElapsedColumn()) as progress:
            for point in points:
                measured = measure_point(point, options.rounds, progress)
                results.setdefault(point.group, []).append(measured)
            for group, measure in MEASURE_OWN.items():
                if not options.points or group in options.points:
                    results[group] = measure(progress, options.rounds, options.share)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    options.results.mkdir(parents=True, exist_ok=True)
    for group, measured in results.items():
        told = {"machine": machine(), "rounds": options.rounds, "points": measured}
        (options.results / f"{group}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(write_report(options.results, only=list(results)))


if __name__ == "__main__":
    main()
