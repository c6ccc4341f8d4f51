"""What was sent is what clients' own decoders make of the log, wherever the bytes were cut."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx
import httpx_sse
import pytest
from openai._streaming import SSEDecoder

from pyserve import Config, StreamSessionManager, _core

DECODERS = Path(__file__).parent / "decoders"
RANDOM_CASES = 20_000 if os.environ.get("PYSERVE_SOAK") else 200

#: An event as a decoder tells it: name, data, id.
Event = tuple[str | None, str, str | None]


@dataclass
class Case:
    """Upstream bytes, and the (name, data) of the events that they hold."""

    upstream: bytes
    events: list[tuple[str | None, str]]


HAND_PICKED = {
    "lf": Case(b"data: a\n\ndata: b\n\n", [(None, "a"), (None, "b")]),
    "crlf": Case(b"data: a\r\n\r\ndata: b\r\n\r\n", [(None, "a"), (None, "b")]),
    "cr": Case(b"data: a\r\rdata: b\r\r", [(None, "a"), (None, "b")]),
    "mixed line ends": Case(b"data: a\r\n\ndata: b\r\r\ndata: c\n\r", [(None, x) for x in "abc"]),
    "byte order mark": Case(b"\xef\xbb\xbfdata: a\n\n", [(None, "a")]),
    "second byte order mark": Case(
        b"\xef\xbb\xbfdata: \xef\xbb\xbfa\n\n\xef\xbb\xbfdata: b\n\ndata: c\n\n",
        [(None, "\ufeffa"), (None, "c")],
    ),
    "comments": Case(b": hi\n\n:\n\n: in\ndata: a\n: between\ndata: b\n\n", [(None, "a\nb")]),
    "many lines": Case(b"data: a\ndata:\ndata: \ndata: b\n\n", [(None, "a\n\n\nb")]),
    "empty data": Case(b"data:\n\ndata\n\ndata: \n\n", [(None, "")] * 3),
    "spaces": Case(b"data:a\n\ndata:  a \n\n", [(None, "a"), (None, " a ")]),
    "colons": Case(b"data: a: b\n\ndata::\n\n", [(None, "a: b"), (None, ":")]),
    "names": Case(b"event: x\ndata: a\n\nevent\ndata: b\n\n", [("x", "a"), (None, "b")]),
    "a name without data": Case(b"event: x\n\ndata: a\n\n", [(None, "a")]),
    "two names": Case(b"event: x\nevent: y\ndata: a\n\n", [("y", "a")]),
    "foreign ids": Case(b"id: 7\ndata: a\n\nid\nretry: 9\ndata: b\n\n", [(None, "a"), (None, "b")]),
    "only an id": Case(b"id: 7\n\nretry: 9\n\ndata: a\n\n", [(None, "a")]),
    "nearly fields": Case(b"ids: 7\nData: x\ndata : y\ndata: a\n\n", [(None, "a")]),
    "unicode": Case("data: grüße 🦙 你好\n\n".encode(), [(None, "grüße 🦙 你好")]),
    # str.splitlines() would split here; SSE does not.
    "no line ends": Case(
        "data: \v\f\x1c\x85\u2028\u2029\n\n".encode(), [(None, "\v\f\x1c\x85\u2028\u2029")]
    ),
    "nul": Case(b"data: a\0b\n\n", [(None, "a\0b")]),
    "done": Case(b'data: {"a":1}\n\ndata: [DONE]\n\n', [(None, '{"a":1}'), (None, "[DONE]")]),
    "broken off": Case(b"data: a\n\ndata: b\ndata: c", [(None, "a")]),
    "no last blank line": Case(b"data: a\n\ndata: b\n", [(None, "a"), (None, "b")]),
    "nothing": Case(b"", []),
}


def random_case(seed: int) -> Case:
    """Events in a random spelling."""
    rng = random.Random(seed)
    text, events = "", []
    line_end = rng.choice(["\n", "\r\n", "\r"])

    def noise() -> str:
        return rng.choice(["", "", f": {seed}{line_end}", f"id: x{line_end}", f"foo: 1{line_end}"])

    for _ in range(rng.randrange(1, 12)):
        name = rng.choice([None, None, "delta", "grüße"])
        letters = 'ab :{}"\\\t\0\x7füß€🦙\u2028\x85\ufeff'
        lines = ["".join(rng.choices(letters, k=rng.choice([0, 1, 30]))) for _ in range(3)]
        del lines[rng.randrange(1, 4) :]
        fields = [f"data: {line}{line_end}" for line in lines]
        if name is not None:
            fields.insert(rng.randrange(len(fields) + 1), f"event: {name}{line_end}")
        text += rng.choice(["", f":{line_end}{line_end}"]) + noise()
        text += "".join(field + noise() for field in fields) + line_end
        events.append((name, "\n".join(lines)))
    return Case(text.encode(), events)


CASES = {**HAND_PICKED, **{f"seed {seed}": random_case(seed) for seed in range(RANDOM_CASES)}}


def log_of(pieces: list[bytes], *, beat: bool = False) -> bytes:
    """The log after these appends, its epoch replaced by as many E; with `beat` a heartbeat is due
    after each of them."""
    clock = _core.ManualClock()
    manager = StreamSessionManager(Config(), clock=clock)
    session = manager.create_or_replace("c")
    for piece in pieces:
        session.append(piece)
        if beat:
            clock.advance(1.0)
            manager._core.tick()
    session.finalize()
    reader = session.read_from()
    log = b""
    while block := reader.read_ready():
        log += block
    return log.replace(f"id: {session.epoch}-".encode(), b"id: " + b"E" * len(session.epoch) + b"-")


def cut(text: bytes, seed: object) -> list[bytes]:
    """The text in pieces of 1 to 9 bytes, so that characters and line ends are cut through."""
    rng = random.Random(str(seed))
    pieces = []
    while text:
        size = rng.randrange(1, 10)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def expected_events(case: Case, log: bytes) -> list[Event]:
    """What was sent, with the ids that the log must give it: the offset after each event."""
    ends = [match.end() for match in re.finditer(rb"\n\n", log)]
    assert len(ends) == len(case.events)
    ids = [match[1].decode() for match in re.finditer(rb"\nid: (E+-\d+)\n\n", log)]
    assert [int(text.partition("-")[2]) for text in ids] == ends
    return [(name, data, id_) for (name, data), id_ in zip(case.events, ids, strict=True)]


@pytest.mark.parametrize("case", HAND_PICKED.values(), ids=HAND_PICKED)
def test_every_split_of_the_input_gives_the_same_log(case: Case) -> None:
    whole = log_of([case.upstream])
    assert log_of([case.upstream[i : i + 1] for i in range(len(case.upstream))]) == whole
    for at in range(len(case.upstream) + 1):
        assert log_of([case.upstream[:at], b"", case.upstream[at:]]) == whole


def test_random_splits_of_random_input_give_the_same_log() -> None:
    for seed in range(RANDOM_CASES):
        upstream = random_case(seed).upstream
        assert log_of(cut(upstream, seed)) == log_of([upstream]), f"seed {seed}"


def test_a_heartbeat_stands_between_two_events_and_nowhere_else() -> None:
    log = log_of([b"data: a\n", b"\n", b"data: b\ndata: c", b"\n\n"], beat=True)
    assert re.sub(rb"(retry: 1000\n)?id: E+-\d+\n", b"", log) == (
        b": ping\ndata: a\n\n: ping\n: ping\ndata: b\ndata: c\n\n: ping\n: end completed\n"
    )


@pytest.fixture(scope="module")
def logs() -> dict[str, tuple[bytes, list[Event]]]:
    """For each case its log, with heartbeats wherever one can stand, and what it must decode to."""
    made = {}
    for name, case in CASES.items():
        log = log_of(cut(case.upstream, name), beat=True)
        made[name] = (log, expected_events(case, log))
    return made


def test_the_openai_sdk_decodes_what_was_sent(logs: dict[str, tuple[bytes, list[Event]]]) -> None:
    for name, (log, expected) in logs.items():
        decoded = SSEDecoder().iter_bytes(iter(cut(log, name)))
        assert [(e.event or None, e.data, e.id) for e in decoded] == expected, name


def test_httpx_sse_decodes_what_was_sent(logs: dict[str, tuple[bytes, list[Event]]]) -> None:
    for name, (log, expected) in logs.items():
        response = httpx.Response(
            200,
            headers={"Content-Type": "text/event-stream; charset=utf-8"},
            content=iter(cut(log, name)),
        )
        decoded = httpx_sse.EventSource(response).iter_sse()
        told = [(None if e.event == "message" else e.event, e.data, e.id) for e in decoded]
        assert told == expected, name


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    installed = (DECODERS / "node_modules" / "eventsource-parser").is_dir()
    if not found or not installed:
        assert not os.environ.get("CI"), "node or eventsource-parser is missing"
        pytest.skip("node or eventsource-parser is missing (make test-python installs it)")
    return found


def test_eventsource_parser_decodes_what_was_sent(
    logs: dict[str, tuple[bytes, list[Event]]], node: str
) -> None:
    chunked = [
        [base64.b64encode(piece).decode() for piece in cut(log, name)]
        for name, (log, _) in logs.items()
    ]
    # Without a sanitizer's runtime, which this Python may have been started with.
    env = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    answer = subprocess.run(
        [node, DECODERS / "decode.mjs"],
        input=json.dumps(chunked).encode(),
        capture_output=True,
        check=True,
        env=env,
    )
    for (name, (_, expected)), events in zip(logs.items(), json.loads(answer.stdout), strict=True):
        assert [(event or None, data, id_) for event, data, id_ in events] == expected, name
