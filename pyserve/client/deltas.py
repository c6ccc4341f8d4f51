"""What a person reads in an event: the text of every kind of stream that pyserve carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyserve.client.sse import Event


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. Without any of the three the event is one of the protocol's own."""

    text: str = ""
    #: what the model thinks before it answers
    reasoning: str = ""
    #: what went wrong, as the stream tells it
    error: str = ""


def read_delta(event: Event) -> Delta:
    """The text of an event: a chat completion's first choice, a completion's, llama.cpp's own, the
    Responses API's, the Messages API's, a job's. Anything else is text as it is, a line of it."""
    if event.data == "[DONE]":
        return Delta()
    try:
        told = event.json()
        for read in _READERS:
            if isinstance(told, dict) and (delta := read(event, told)) is not None:
                return delta
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        pass  # not JSON, or of a shape of its own
    return Delta(text=event.data + "\n")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _error(_event: Event, told: dict[str, Any]) -> Delta | None:
    if told.get("error") is None:
        return None
    error = told["error"]
    return Delta(error=error if isinstance(error, str) else error["message"])


def _choice(_event: Event, told: dict[str, Any]) -> Delta | None:
    if "choices" not in told:
        return None
    for choice in told["choices"]:
        if choice.get("index", 0) == 0:
            delta = choice.get("delta") or {}
            text = _text(delta.get("content")) or _text(choice.get("text"))
            # llama.cpp and DeepSeek write the one, others the other.
            thought = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
            return Delta(text, thought)
    return Delta()  # the last chunk may hold usage only


def _completion(_event: Event, told: dict[str, Any]) -> Delta | None:
    return Delta(told["content"]) if "content" in told and "stop" in told else None


def _response(_event: Event, told: dict[str, Any]) -> Delta | None:
    kind = told.get("type", "")
    if not kind.startswith("response."):
        return None
    if kind == "response.failed":
        return Delta(error=told["response"]["error"]["message"])
    if kind == "response.output_text.delta":
        return Delta(told["delta"])
    if kind in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta"):
        return Delta(reasoning=told["delta"])
    return Delta()


def _message(event: Event, told: dict[str, Any]) -> Delta | None:
    # Every event of this API bears its type as its name, too.
    if told.get("type") != event.event:
        return None
    delta = told.get("delta") or {}
    return Delta(_text(delta.get("text")), _text(delta.get("thinking")))


def _job(event: Event, told: dict[str, Any]) -> Delta | None:
    if "job_id" not in told or event.event == "message":
        return None
    if event.event == "reasoning":
        return Delta(reasoning=told["token"])
    return Delta(told["token"] if event.event == "token" else "")


_READERS: list[Callable[[Event, dict[str, Any]], Delta | None]] = [
    _error,
    _choice,
    _completion,
    _response,
    _message,
    _job,
]
