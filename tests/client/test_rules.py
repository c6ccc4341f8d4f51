"""Loss or end: every row of ``tests/client_rules.json``, which `pyserve.js` is held to as well."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from serving import serving

from pyserve import client as client_module
from pyserve.client import Client, ClientError, EventStream

RULES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "client_rules.json").read_text()
)

#: What the server has, and how much of it comes before the connection is lost.
LOG = b"data: one\nid: e1-21\n\ndata: two\nid: e1-42\n\n: end completed\n"
FIRST_EVENT_END = 21


def told(rule: dict[str, Any]) -> web.Response:
    """The rule's answer."""
    headers = {"Retry-After": rule["retry_after"]} if "retry_after" in rule else {}
    if "reason" in rule:
        error = {"code": rule["status"], "reason": rule["reason"], "message": "as scripted"}
        return web.json_response({"error": error}, status=rule["status"], headers=headers)
    return web.Response(
        status=rule["status"],
        text="not of pyserve's making",
        content_type=rule.get("content_type", "text/plain"),
        headers=headers,
    )


def read_from(request: web.Request, end: int | None = None) -> web.Response:
    """The log from where it is asked for."""
    position = int(request.query.get("from", "0").removeprefix("e1-"))
    return web.Response(
        body=LOG[position:end],
        content_type="text/event-stream",
        headers={"X-Stream-Epoch": "e1", "X-Stream-Offset": str(position)},
    )


class ScriptedServer:
    """Answers as the rule has it, once; well, otherwise."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.requests: list[web.Request] = []
        self.url = ""
        self._rule = rule
        self._script = deque(["rule"] if rule["when"] != "reattach" else ["cut", "rule"])

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        step = self._script.popleft() if self._script else "well"
        if step == "rule":
            return told(self._rule)
        return read_from(request, FIRST_EVENT_END if step == "cut" else None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/v1/stream", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        async with serving(app) as server:
            self.url = server.url
            yield


def opened(client: Client, rule: dict[str, Any]) -> EventStream:
    if rule["when"] == "submit":
        return client.submit({"messages": []}, "chat")
    return client.attach("chat")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['when']}: {rule['name']}")
async def test_a_loss_is_not_taken_for_an_end_nor_an_end_for_a_loss(rule: dict[str, Any]) -> None:
    server = ScriptedServer(rule)
    async with server.running(), Client(server.url, first_delay_s=0.001) as client:
        stream = opened(client, rule)
        events: list[str] = []
        raised: ClientError | None = None
        try:
            async for event in stream:
                events.append(event.data)  # noqa: PERF401  # what came before an error counts
        except ClientError as error:
            raised = error

    before = 1 if rule["when"] == "reattach" else 0
    if rule["then"] == "retry":
        assert raised is None
        assert (events, stream.state) == (["one", "two"], "completed")
        assert len(server.requests) == before + 2
    elif rule["python"] is None:
        assert raised is None
        assert (events, stream.state) == ([], "cancelled")
    else:
        assert type(raised) is getattr(client_module, rule["python"])
        assert events == ["one"][:before]
        assert len(server.requests) == before + 1


async def test_a_post_that_is_repeated_is_the_same_post() -> None:
    (rule,) = [rule for rule in RULES if rule.get("reason") == "model_loading"]
    server = ScriptedServer(rule)
    async with server.running(), Client(server.url, first_delay_s=0.001) as client:
        async for _ in client.submit({"messages": []}, "chat"):
            pass
    first, second = server.requests
    assert first.method == second.method == "POST"
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    assert first.rel_url == second.rel_url
