"""Every way to measure works, with small counts; the load client checks the bytes."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


async def run_bench(*arguments: str | Path) -> str:
    """``bench/run.py`` with these arguments; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, BENCH / "run.py", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


async def measure(results: Path, point: str, share: float) -> dict[str, Any]:
    """What one round of `point` found."""
    await run_bench(point, "--rounds", "1", "--share", str(share), "--results", results)
    assert (results / "README.md").stat().st_size > 0
    group = next(results.glob("*.json"))
    measured: dict[str, Any] = json.loads(group.read_text())["points"][0]
    assert measured["name"] == point
    assert (results / f"{measured['group']}.svg").read_text().startswith("<?xml")
    return measured


@pytest.mark.parametrize(
    ("point", "servers"),
    [
        ("fan-out-10", {"pyserve", "aiohttp", "bare"}),
        ("burst-10", {"pyserve", "aiohttp", "bare"}),
        ("reattach", {"pyserve", "aiohttp", "bare"}),
        ("upstream-streams", {"pyserve", "aiohttp", "pyserve+upstream", "aiohttp+upstream"}),
    ],
)
async def test_each_server_delivers_every_event(
    programs: Path, tmp_path: Path, point: str, servers: set[str]
) -> None:
    measured = await measure(tmp_path, point, 0.05)
    assert set(measured["summary"]) == servers
    events = {name: run["events"] for name, run in measured["runs"][0].items()}
    each = 10 if measured["way"] == "reattach" else measured["events"]
    assert events == dict.fromkeys(servers, each * measured["readers"] * measured["batches"])
    for figures in measured["summary"].values():
        assert all(figure["median"] > 0 for figure in figures.values())


async def test_stalled_readers_take_nothing(programs: Path, tmp_path: Path) -> None:
    measured = await measure(tmp_path, "stalled-20%", 0.1)
    for run in measured["runs"][0].values():
        assert run["stalled"] == 2
        assert run["events"] == 8 * measured["events"]


async def test_a_replay_is_compared_with_a_file(programs: Path, tmp_path: Path) -> None:
    measured = await measure(tmp_path, "replay-1", 0.05)
    assert ("nginx" in measured["summary"]) == (shutil.which("nginx") is not None)
    bodies = {name: run["body_bytes"] for name, run in measured["runs"][0].items()}
    assert max(bodies.values()) - min(bodies.values()) <= 64  # a comment, digits of an epoch


@pytest.mark.parametrize("point", ["proxy-8", "ancestor-reattach"])
async def test_llama_is_measured_alone_and_behind_pyserve(
    programs: Path, tmp_path: Path, point: str
) -> None:
    pytest.importorskip("xllamacpp")
    measured = await measure(tmp_path, point, 0.05)
    assert set(measured["summary"]) == {"pyserve+llama.cpp", "llama.cpp"}


async def test_two_owners_are_measured_at_each_queue(programs: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    measured = await measure(tmp_path, "fairness", 0.1)
    assert set(measured["summary"]) == {"fair queue", "common queue", "llama.cpp's queue"}
    for run in measured["runs"][0].values():
        waited_ms = [waited_ms for _, waited_ms in run["light"]]
        assert 0 < min(waited_ms) <= run["light_first_token_ms"]["p50"]
        assert run["light_first_token_ms"]["max"] == max(waited_ms)
        assert run["heavy_first_token_ms"]["max"] <= 1000 * run["seconds"]


async def test_each_batch_size_is_measured(tmp_path: Path, programs: Path) -> None:
    told = await run_bench("batch", "--rounds", "2", "--share", "0.02", "--results", tmp_path)
    rows = json.loads((tmp_path / "batch.json").read_text())["points"]
    assert [row["name"] for row in rows] == ["batch_1", "batch_4", "batch_16"]
    for row in rows:
        assert len(row["runs"]) == 2
        assert 0 < min(row["runs"]) <= row["value"] <= max(row["runs"])
        assert f"| {row['title']} |" in told
        assert row["title"] in (tmp_path / "batch.svg").read_text()


async def test_the_core_is_measured(tmp_path: Path, programs: Path) -> None:
    await run_bench("core", "--share", "0.01", "--results", tmp_path)
    rows = json.loads((tmp_path / "core.json").read_text())["points"]
    assert {"python_append", "idle_1000"} <= {row["name"] for row in rows}
    assert all(row["value"] >= 0 for row in rows)


async def test_an_unknown_point_is_named() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, BENCH / "run.py", "no-such-point"), stderr=asyncio.subprocess.PIPE
    )
    _, complaint = await process.communicate()
    assert process.returncode == 1
    assert b"no-such-point" in complaint


async def test_every_point_is_listed() -> None:
    listed = await run_bench("--list")
    assert {"fan-out", "burst", "replay", "fairness", "batch", "core"} <= {
        line.split()[0] for line in listed.splitlines()
    }
