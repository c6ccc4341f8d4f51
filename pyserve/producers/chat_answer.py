"""OpenAI-compatible answers, made from a model's tokens: a stream of chunks, or one JSON."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from pyserve.producers.batch import Token


@dataclass
class ChatAnswer:
    """One answer of one model. Its tokens can be given to one of the two forms, once."""

    answer_id: str
    model: str
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    _completion_tokens: int = 0
    _finish_reason: str | None = None

    async def to_events(
        self, tokens: AsyncIterator[Token], *, include_usage: bool = False
    ) -> AsyncIterator[bytes]:
        """The answer as SSE events, each as soon as its token is there, with ``[DONE]`` last.

        `include_usage` is the request's ``stream_options.include_usage``.
        """
        yield self._chunk({"role": "assistant", "content": ""})
        async for text in self._texts(tokens):
            yield self._chunk({"content": text})
        yield self._chunk({}, self._finish_reason)
        if include_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], **self._usage()})
        yield b"data: [DONE]\n\n"

    async def to_json(self, tokens: AsyncIterator[Token]) -> bytes:
        """The whole answer, for a request without ``stream``."""
        content = "".join([text async for text in self._texts(tokens)])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": content},
            "finish_reason": self._finish_reason,
        }
        answer = {**self._head("chat.completion"), "choices": [choice], **self._usage()}
        return orjson.dumps(answer)

    async def _texts(self, tokens: AsyncIterator[Token]) -> AsyncIterator[str]:
        """The tokens' texts but for empty ones, which no client wants to read."""
        async for token in tokens:
            self._finish_reason = token.finish_reason
            if token.text:
                self._completion_tokens += 1
                yield token.text

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self._completion_tokens,
                "total_tokens": self.prompt_tokens + self._completion_tokens,
            }
        }


class TextAnswer(ChatAnswer):
    """The same for ``/v1/completions``: text that goes on, in place of messages."""

    async def to_events(
        self, tokens: AsyncIterator[Token], *, include_usage: bool = False
    ) -> AsyncIterator[bytes]:
        """As a chat's, without roles."""
        async for text in self._texts(tokens):
            yield _event({**self._head("text_completion"), "choices": [self._choice(text)]})
        last = self._choice("", self._finish_reason)
        yield _event({**self._head("text_completion"), "choices": [last]})
        if include_usage:
            yield _event({**self._head("text_completion"), "choices": [], **self._usage()})
        yield b"data: [DONE]\n\n"

    async def to_json(self, tokens: AsyncIterator[Token]) -> bytes:
        """As a chat's."""
        text = "".join([text async for text in self._texts(tokens)])
        choice = self._choice(text, self._finish_reason)
        answer = {**self._head("text_completion"), "choices": [choice], **self._usage()}
        return orjson.dumps(answer)

    def _choice(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish_reason}


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"
