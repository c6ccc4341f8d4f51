"""The demo's own routes, through pyserve: both models, both forms of a question."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from serving import events_of, serving

from pyserve import ModelConfig

PROMPT = {"prompt": "The log", "max_tokens": 4, "stream_options": {"include_usage": True}}


@pytest.fixture
def models() -> list[ModelConfig]:
    pytest.importorskip("numpy")
    return [
        ModelConfig("tour", demo=True),
        ModelConfig("small", demo=True, upstream_model="pyserve-ngram"),
    ]


async def test_a_prompt_is_completed_as_text(models: list[ModelConfig]) -> None:
    async with serving(models=models) as server:
        question = {**PROMPT, "model": "small"}
        told = (await server.fetch("POST", "/v1/completions", json=question)).json()
        assert told["object"] == "text_completion"
        assert told["choices"][0]["finish_reason"] == "length"
        assert told["usage"]["completion_tokens"] == 4
        streamed = await server.fetch(
            "POST",
            "/v1/completions",
            {"X-Conversation-Id": "c"},
            json={**question, "stream": True},
        )
        *events, done = [event.data for event in events_of(streamed.body)]
        assert done == "[DONE]"
        chunks: list[Any] = [orjson.loads(event) for event in events]
        texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
        assert len([text for text in texts if text]) == 4
        assert chunks[-1]["usage"]["completion_tokens"] == 4


async def test_the_tour_is_the_answer_to_everything_else(models: list[ModelConfig]) -> None:
    async with serving(models=models) as server:
        for path, question in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": []}),
        ):
            told = (await server.fetch("POST", path, json={**question, "model": "tour"})).body
            assert b"pyserve's demo" in told
