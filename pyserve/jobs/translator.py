"""An upstream's chunks into a job's events: content, reasoning, tool calls, usage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from pyserve.client.sse import Comment, Decoder, Event
from pyserve.errors import ApiError
from pyserve.jobs.job import Job, JobLog

#: Why a model stopped, as far as a job tells it as its reason.
FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})

_MAX_ERROR_MESSAGE_CHARS = 2000

# Up to here each piece of a call's arguments is told; a longer text, which is told whole each time,
# when it has grown by an eighth. So all that is told is a small multiple of it.
_EAGER_ARGUMENTS_CHARS = 256


@dataclass
class _ToolCall:
    """One that the model is writing."""

    index: int
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    length: int = 0
    told_length: int = 0

    def add(self, piece: str) -> None:
        self.arguments.append(piece)
        self.length += len(piece)

    @property
    def is_worth_telling(self) -> bool:
        grown = self.length - self.told_length
        return grown > 0 and (self.length <= _EAGER_ARGUMENTS_CHARS or grown >= self.length // 8)


class Translator:
    """A sink for an upstream's stream that writes a job's."""

    def __init__(self, job: Job, log: JobLog) -> None:
        self.finish_reason: str | None = None
        self._job = job
        self._log = log
        self._decoder = Decoder()
        self._ends_with_line = False
        self._last_data = ""
        self._call: _ToolCall | None = None
        self._timings: dict[str, Any] | None = None
        self._usage_told = False

    def append(self, sse: bytes, /) -> None:
        """Take the next bytes, split anywhere.

        Raises:
            ApiError: the upstream tells an error, or what nobody understands.
            SessionEndedError, EventTooLargeError, MemoryBudgetError: the job is over.
        """
        self._ends_with_line = sse.endswith((b"\n", b"\r"))
        for item in self._decoder.feed(sse):
            if not isinstance(item, Comment):
                self._take(item)

    def end_input(self) -> None:
        """An event may lack its blank line; a line that broke off is dropped.

        Raises:
            As :meth:`append`.
        """
        if self._ends_with_line:
            self.append(b"\n")
        self._finish()

    def last_event(self) -> bytes:
        """The upstream's newest event."""
        return b"data: " + self._last_data.encode() + b"\n\n"

    def _take(self, event: Event) -> None:
        self._last_data = event.data
        if event.data == "[DONE]":
            self._finish()
            return
        try:
            chunk = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            raise ApiError("upstream_invalid") from None
        if not isinstance(chunk, dict):
            raise ApiError("upstream_invalid")
        if chunk.get("error") is not None:
            raise _told_error(chunk["error"])
        for choice in _objects(chunk.get("choices")):
            if choice.get("index", 0) == 0:
                self._take_choice(choice)
        if isinstance(chunk.get("usage"), dict):
            self._job.usage = chunk["usage"]
        if isinstance(chunk.get("timings"), dict):
            self._timings = chunk["timings"]

    def _take_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = {"content": choice.get("text")}  # a completion's
        # llama.cpp and DeepSeek write the one, others the other.
        thought = _text(delta.get("reasoning_content")) or _text(delta.get("reasoning"))
        if thought:
            self._job.metrics.count_token()
            self._log.emit("reasoning", token=thought)
            self._job.output.reasoning.add(thought)
        if text := _text(delta.get("content")):
            self._job.metrics.count_token()
            self._log.emit("token", token=text)
            self._job.output.text.add(text)
        for piece in _objects(delta.get("tool_calls")):
            self._job.metrics.count_token()
            self._take_tool_call(piece)
        if choice.get("finish_reason") is not None:
            self._end_tool_call()
            self.finish_reason = _text(choice["finish_reason"])

    def _take_tool_call(self, piece: dict[str, Any]) -> None:
        index = piece.get("index", 0)
        function = piece.get("function")
        function = function if isinstance(function, dict) else {}
        call = self._call
        if call is None or call.index != index:
            self._end_tool_call()
            call = self._call = _ToolCall(index, _text(piece.get("id")))
        call.add(_text(function.get("arguments")))
        if not call.name:
            call.name = _text(function.get("name"))
            if call.name:
                self._tell("tool_start", call, name=call.name)
        if call.name and call.is_worth_telling:
            call.told_length = call.length
            self._tell("tool_status", call, arguments="".join(call.arguments))

    def _end_tool_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            whole = {"name": call.name, "arguments": "".join(call.arguments)}
            self._job.output.add_tool_call({"id": call.id, **whole})
            self._tell("tool_end", call, **whole)

    def _tell(self, event: str, call: _ToolCall, **fields: Any) -> None:
        self._log.emit(event, index=call.index, tool_call_id=call.id, **fields)

    def _finish(self) -> None:
        """All is said: what waited for the end."""
        self._end_tool_call()
        if self._usage_told or (self._job.usage is None and self._timings is None):
            return
        self._usage_told = True
        timings = {} if self._timings is None else {"timings": self._timings}
        self._log.emit("usage", usage=self._job.usage, **timings)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _told_error(error: Any) -> ApiError:
    """An error that the upstream tells within its stream."""
    message = error.get("message") if isinstance(error, dict) else error
    return ApiError("upstream_error", _text(message)[:_MAX_ERROR_MESSAGE_CHARS] or None)
