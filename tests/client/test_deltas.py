"""What a person reads in the events of each kind of stream."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from pyserve.client import Event
from pyserve.client.deltas import Delta, read_delta


def chat(**delta: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}


@pytest.mark.parametrize(
    ("told", "delta"),
    [
        # chat completions
        (chat(role="assistant", content=None), Delta()),
        (chat(content="hi"), Delta("hi")),
        (chat(reasoning_content="hm"), Delta(reasoning="hm")),
        (chat(reasoning="hm"), Delta(reasoning="hm")),
        (chat(tool_calls=[{"index": 0}]), Delta()),
        ({"choices": [], "usage": {"total_tokens": 3}}, Delta()),
        ({"choices": [{"index": 1, "delta": {"content": "another choice"}}]}, Delta()),
        # completions, and llama.cpp's own route
        ({"choices": [{"index": 0, "text": "hi"}]}, Delta("hi")),
        ({"content": "hi", "stop": False, "index": 0}, Delta("hi")),
        # errors, as chunks
        ({"error": {"message": "lost", "reason": "upstream_lost"}}, Delta(error="lost")),
        ({"error": "lost"}, Delta(error="lost")),
        # responses
        ({"type": "response.created", "response": {"error": None}}, Delta()),
        ({"type": "response.output_text.delta", "delta": "hi"}, Delta("hi")),
        ({"type": "response.reasoning_text.delta", "delta": "hm"}, Delta(reasoning="hm")),
        ({"type": "response.reasoning_summary_text.delta", "delta": "hm"}, Delta(reasoning="hm")),
        ({"type": "response.failed", "response": {"error": {"message": "no"}}}, Delta(error="no")),
    ],
)
def test_the_text_of_an_unnamed_event(told: dict[str, Any], delta: Delta) -> None:
    assert read_delta(Event(orjson.dumps(told).decode())) == delta


@pytest.mark.parametrize(
    ("name", "told", "delta"),
    [
        ("message_start", {"type": "message_start", "message": {}}, Delta()),
        (
            "content_block_delta",
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}},
            Delta("hi"),
        ),
        (
            "content_block_delta",
            {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
            Delta(reasoning="hm"),
        ),
        ("message_stop", {"type": "message_stop"}, Delta()),
        ("error", {"type": "error", "error": {"message": "lost"}}, Delta(error="lost")),
        (
            "response.output_text.delta",
            {"type": "response.output_text.delta", "delta": "hi"},
            Delta("hi"),
        ),
        ("token", {"job_id": "j", "token": "hi"}, Delta("hi")),
        ("reasoning", {"job_id": "j", "token": "hm"}, Delta(reasoning="hm")),
        ("job_complete", {"job_id": "j", "reason": None}, Delta()),
    ],
)
def test_the_text_of_a_named_event(name: str, told: dict[str, Any], delta: Delta) -> None:
    assert read_delta(Event(orjson.dumps(told).decode(), name)) == delta


@pytest.mark.parametrize(
    "data",
    [
        "plain words",
        "two\nlines",
        "[1, 2]",
        "42",
        '{"my": "own"}',
        '{"choices": 7}',
        '{"type": 7}',
        "{",
    ],
)
def test_anything_else_is_shown_as_it_is(data: str) -> None:
    assert read_delta(Event(data)) == Delta(data + "\n")


def test_the_terminator_of_openais_streams_is_no_text() -> None:
    assert read_delta(Event("[DONE]")) == Delta()
