"""What a job is asked for, read strictly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from pyserve.errors import ApiError
from pyserve.producers.upstream import GENERATION_ROUTES, Route
from pyserve.scheduling.fair_queue import Priority
from pyserve.sessions import is_conversation_id

_ROUTES = {route.path: route for route in GENERATION_ROUTES}
_CHAT, _COMPLETION = _ROUTES["/v1/chat/completions"], _ROUTES["/v1/completions"]

_PRIORITIES = {priority.name.lower(): priority for priority in Priority}

# What a job says itself, or pyserve does.
_NOT_PARAMS = ("messages", "prompt", "model", "stream")

_FIELDS = (
    "prompt",
    "messages",
    "model",
    "conversation_id",
    "stream_id",
    "priority",
    "params",
    "abandon_after_s",
    "max_runtime_s",
)


@dataclass(frozen=True)
class JobRequest:
    """What is to be generated, and how."""

    route: Route
    #: the upstream's body
    body: bytes
    model: str | None = None
    conversation_id: str | None = None
    stream_id: str | None = None
    priority: Priority = Priority.NORMAL
    abandon_after_s: float | None = None
    max_runtime_s: float | None = None


def parse_job_request(told: dict[str, Any]) -> JobRequest:
    """The body of ``POST /v1/jobs``. A null is as good as nothing.

    Raises:
        ApiError: reason ``invalid_body``, or ``invalid_parameter`` with the field's name as
            ``param``; ``invalid_conversation_id``.
    """
    refuse_unknown(told, _FIELDS)
    told = {name: value for name, value in told.items() if value is not None}
    route, asked = _question(told)
    model = _field(told, "model", _is_name, "model is a string that is not empty")
    return JobRequest(
        route=route,
        body=_body(asked, _params(told), model),
        model=model,
        conversation_id=_conversation_id(told),
        stream_id=_field(told, "stream_id", _is_name, "stream_id is what POST /v1/streams told"),
        priority=_priority(told),
        abandon_after_s=_seconds(told, "abandon_after_s"),
        max_runtime_s=_seconds(told, "max_runtime_s"),
    )


def parse_infer_request(told: dict[str, Any]) -> JobRequest:
    """The body of ``POST /infer``.

    Raises:
        ApiError: as :func:`parse_job_request`.
    """
    refuse_unknown(told, ("model", "prompt", "max_tokens"))
    told = {name: value for name, value in told.items() if value is not None}
    if "prompt" not in told:
        raise ApiError("invalid_body", "An inference needs a prompt", param="prompt")
    max_tokens = _field(told, "max_tokens", _is_count, "max_tokens is a whole number, at least 1")
    params = {} if max_tokens is None else {"max_tokens": max_tokens}
    job = {name: told[name] for name in ("model", "prompt") if name in told}
    return parse_job_request(job | {"params": params})


def refuse_unknown(told: dict[str, Any], known: Iterable[str]) -> None:
    """A name that nobody reads is a slip.

    Raises:
        ApiError: reason ``invalid_parameter``.
    """
    known = tuple(known)
    for name in told:
        if name not in known:
            raise ApiError(
                "invalid_parameter",
                f"There is no such field; the fields are {', '.join(known)}",
                param=name[:100],
            )


def _question(told: dict[str, Any]) -> tuple[Route, dict[str, Any]]:
    if ("prompt" in told) == ("messages" in told):
        raise ApiError("invalid_body", "A job has a prompt or messages, one of the two")
    if "prompt" in told:
        prompt = _field(told, "prompt", lambda value: isinstance(value, str), "prompt is a string")
        return _COMPLETION, {"prompt": prompt}
    messages = _field(
        told, "messages", _are_messages, "messages is an array of objects that is not empty"
    )
    return _CHAT, {"messages": messages}


def _params(told: dict[str, Any]) -> dict[str, Any]:
    params = _field(told, "params", lambda value: isinstance(value, dict), "params is an object")
    params = params or {}
    for name in _NOT_PARAMS:
        if name in params:
            raise ApiError(
                "invalid_parameter",
                f"params cannot hold {name}: it is the job's or the server's to say",
                param=f"params.{name}",
            )
    if params.get("n", 1) != 1:
        raise ApiError("invalid_parameter", "A job has one answer: n is 1", param="params.n")
    if not isinstance(params.get("stream_options", {}), dict):
        raise ApiError(
            "invalid_parameter", "stream_options is an object", param="params.stream_options"
        )
    return params


def _body(asked: dict[str, Any], params: dict[str, Any], model: str | None) -> bytes:
    body = {**params, **asked, "stream": True}
    body["stream_options"] = {**params.get("stream_options", {}), "include_usage": True}
    if model is not None:
        body["model"] = model
    return orjson.dumps(body)


def _conversation_id(told: dict[str, Any]) -> str | None:
    conversation_id = told.get("conversation_id")
    if conversation_id is not None and not (
        isinstance(conversation_id, str) and is_conversation_id(conversation_id)
    ):
        raise ApiError("invalid_conversation_id", param="conversation_id")
    return conversation_id


def _priority(told: dict[str, Any]) -> Priority:
    name = told.get("priority", "normal")
    if not isinstance(name, str) or name not in _PRIORITIES:
        raise ApiError("invalid_parameter", "priority is high, normal or low", param="priority")
    return _PRIORITIES[name]


def _seconds(told: dict[str, Any], name: str) -> float | None:
    seconds = _field(told, name, _is_time, f"{name} is a number of seconds larger than 0")
    return None if seconds is None else float(seconds)


def _field(told: dict[str, Any], name: str, is_valid: Callable[[Any], bool], message: str) -> Any:
    value = told.get(name)
    if value is not None and not is_valid(value):
        raise ApiError("invalid_parameter", message, param=name)
    return value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return _is_number(value) and value > 0 and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(m, dict) for m in value)
