"""The list of models for everybody, and their administration for who has the key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_upstream import DONE, LAST_CHUNK, SSE_HEAD, STALL, FakeUpstream, answer, chunk, token
from serving import Response, Server, serving, texts_of, until

from pyserve import ConfigError, ModelConfig, create_app
from pyserve.config import Config
from pyserve.routes.context import CONTEXT

CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer the key"}

#: What a healthy upstream says to a swap: its health, its slots, and the warm-up's token.
WELL = answer(200, {"status": "ok"})
SLOTS = answer(200, {"total_slots": 3})
WARM = answer(200, {"choices": [{}]})


@pytest.fixture(autouse=True)
def _the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_ADMIN_KEY", "the key")


@pytest.fixture
async def other() -> AsyncIterator[FakeUpstream]:
    async with FakeUpstream() as fake:
        yield fake


@pytest.fixture
async def server(upstream: FakeUpstream) -> AsyncIterator[Server]:
    """Has one model, m, at the fake upstream."""
    model = ModelConfig("m", upstream=upstream.url, slots=2)
    async with serving(models=[model]) as running:
        yield running


async def ask(server: Server, method: str, target: str, body: Any = None) -> Response:
    return await server.fetch(method, target, KEY, json=body)


async def version_of(server: Server, name: str = "m") -> str:
    return (await ask(server, "GET", f"/admin/models/{name}")).json()["version"]


async def begin(server: Server, upstream: FakeUpstream, end: asyncio.Event) -> Response:
    """A generation that goes on until the event."""
    upstream.play((SSE_HEAD, chunk(token("a")), end, chunk(DONE), LAST_CHUNK))
    response = await server.post("c")
    await response.read_until(token("a")[:-1])
    return response


# --- the list


async def test_the_models_are_listed_in_openais_form(server: Server) -> None:
    listed = (await server.fetch("GET", "/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("m", "model", "pyserve")
    assert (model["version"], model["status"], model["slots"]) == ("1", "serving", 2)
    assert (model["running"], model["waiting"]) == (0, 0)
    assert (await server.fetch("GET", "/models")).json() == listed


# --- who may


async def test_without_a_key_there_is_no_administration(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSERVE_ADMIN_KEY")
    async with serving(upstream=upstream.url) as server:
        for method, target in (
            ("GET", "/admin/models"),
            ("POST", "/admin/models"),
            ("GET", "/admin/models/m"),
            ("POST", "/admin/models/m/swap"),
            ("DELETE", "/admin/models/m"),
        ):
            response = await server.fetch(method, target, KEY)
            assert (response.status, response.error["reason"]) == (404, "not_found")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "the key"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer the"},
        {"Authorization": "Bearer the key too"},
        {"Authorization": "Basic the key"},
        {"Authorization": "Bearer th\u00e9 key"},
        {"X-Api-Key": "the key"},
    ],
)
async def test_the_wrong_key_is_401_and_changes_nothing(
    server: Server, headers: dict[str, str]
) -> None:
    for method, target in (
        ("GET", "/admin/models"),
        ("POST", "/admin/models"),
        ("GET", "/admin/models/m"),
        ("POST", "/admin/models/m/swap"),
        ("DELETE", "/admin/models/m"),
        ("DELETE", "/admin/models/unknown"),
    ):
        response = await server.fetch(method, target, headers)
        assert (response.status, response.error["reason"]) == (401, "admin_key_required")
        assert response.headers["www-authenticate"] == "Bearer"
    assert len(server.app[CONTEXT].models.known) == 1


async def test_the_key_may_come_from_a_file_and_wins(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("from a file\n")
    async with serving(upstream=upstream.url, admin_key_file=tmp_path / "key") as server:
        assert (await ask(server, "GET", "/admin/models")).status == 401
        headers = {"Authorization": "bearer from a file"}
        assert (await server.fetch("GET", "/admin/models", headers)).status == 200


def test_a_key_that_cannot_be_read_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="admin_key_file cannot be read"):
        create_app(Config(demo=True, admin_key_file=tmp_path / "none"))


# --- a model more


async def test_a_model_is_registered_when_it_has_answered_its_warm_up(
    server: Server, other: FakeUpstream
) -> None:
    other.play(WELL, WELL, SLOTS, WARM, answer(200, {"is": "new"}))
    body = {"name": "org/new", "upstream": other.url, "warm_up": "Hi"}
    registered = await ask(server, "POST", "/admin/models", body)
    assert registered.status == 201
    assert registered.json()["version"] == "1"
    (version,) = registered.json()["versions"]
    assert (version["state"], version["progress"], version["slots"]) == ("serving", 1.0, 3)
    warm_up = other.exchanges[3]
    assert (warm_up.method, warm_up.target) == ("POST", CHAT)
    assert b'"max_tokens":1,' in warm_up.body
    assert b'"content":"Hi"' in warm_up.body
    answered = await server.fetch("POST", CHAT, json={"model": "org/new"})
    assert answered.json() == {"is": "new"}
    assert (await ask(server, "GET", "/admin/models/org/new")).json()["version"] == "1"


async def test_a_name_that_is_there_is_409(server: Server, upstream: FakeUpstream) -> None:
    body = {"name": "m", "upstream": upstream.url}
    refused = await ask(server, "POST", "/admin/models", body)
    assert (refused.status, refused.error["reason"]) == (409, "model_exists")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "a model needs a name"),
        ({"name": "x"}, "x: needs one of upstream"),
        ({"name": "x", "demo": True, "slot": 3}, "did you mean 'slots'?"),
        ({"name": "x", "file": "/nowhere.gguf"}, "x: there is no file /nowhere.gguf"),
        ({"name": "x", "demo": True, "slots": "3"}, "slots must be a whole number"),
    ],
)
async def test_what_makes_no_model_is_400_and_says_why(
    server: Server, body: dict[str, Any], detail: str
) -> None:
    refused = await ask(server, "POST", "/admin/models", body)
    assert (refused.status, refused.error["reason"]) == (400, "invalid_model")
    assert detail in refused.error["detail"]
    assert len(server.app[CONTEXT].models.known) == 1


# --- a swap


async def test_a_swap_answers_when_the_new_version_serves_and_the_old_one_finishes(
    server: Server, upstream: FakeUpstream, other: FakeUpstream
) -> None:
    end = asyncio.Event()
    old = await begin(server, upstream, end)
    other.play(WELL, WELL, SLOTS, WARM, answer(200, {"is": "new"}))
    swapped = await ask(server, "POST", "/admin/models/m/swap", {"upstream": other.url})
    assert swapped.status == 200
    assert swapped.json()["version"] == "2"
    new, draining = swapped.json()["versions"]
    assert (new["state"], draining["state"], draining["running"]) == ("serving", "draining", 1)
    assert (await server.fetch("POST", CHAT, json={})).json() == {"is": "new"}
    end.set()
    assert texts_of(await old.read_to_end()) == ["a", "[DONE]"]
    first = server.app[CONTEXT].models.find("m").versions[0]
    await until(lambda: first.state == "stopped")


WRONG = {
    "no health": ((answer(500),), "is not healthy"),
    "no answer": ((b"",), "is not healthy"),
    "refuses the key": ((answer(401),), "refused the server's credentials"),
    "no warm-up": ((WELL, WELL, SLOTS, answer(500, {"error": {"message": "no GPU"}})), "no GPU"),
    "an odd warm-up": ((WELL, WELL, SLOTS, answer(200, {"hello": 1})), "failed its warm-up"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_version_that_cannot_serve_changes_nothing_and_says_why(
    server: Server, upstream: FakeUpstream, other: FakeUpstream, case: str
) -> None:
    script, why = WRONG[case]
    other.play(*script)
    refused = await ask(server, "POST", "/admin/models/m/swap", {"upstream": other.url})
    assert (refused.status, refused.error["reason"]) == (502, "model_load_failed")
    assert why in refused.error["detail"]
    upstream.play(answer(200, {"is": "old"}))
    assert (await server.fetch("POST", CHAT, json={})).json() == {"is": "old"}
    status = (await ask(server, "GET", "/admin/models/m")).json()
    assert status["version"] == "1"
    assert [each["state"] for each in status["versions"]] == ["failed", "serving"]
    assert status["versions"][0]["error"] == refused.error["detail"]


async def test_a_server_that_is_loading_its_model_is_waited_for(
    server: Server, other: FakeUpstream
) -> None:
    loading = answer(503, {"error": {"message": "Loading model", "type": "unavailable_error"}})
    other.play(loading, loading, WELL, WELL, SLOTS, WARM)
    swapped = await ask(server, "POST", "/admin/models/m/swap", {"upstream": other.url})
    assert swapped.json()["version"] == "2"


async def test_it_is_not_waited_for_without_end(
    upstream: FakeUpstream, other: FakeUpstream
) -> None:
    model = ModelConfig("m", upstream=upstream.url)
    async with serving(models=[model], model_load_timeout_s=0.1) as server:
        other.play((STALL,))
        refused = await ask(server, "POST", "/admin/models/m/swap", {"upstream": other.url})
        assert (refused.status, refused.error["detail"]) == (502, "it did not load in time")
        assert await version_of(server) == "1"


async def test_meanwhile_the_status_tells_and_a_second_swap_is_409(
    server: Server, other: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    other.play(WELL, WELL, SLOTS, (go_on, WARM))
    body = {"upstream": other.url, "version": "next"}
    swapping = asyncio.create_task(ask(server, "POST", "/admin/models/m/swap", body))
    await other.exchange(3)
    status = (await ask(server, "GET", "/admin/models")).json()["models"][0]
    assert status["version"] == "1"
    assert [(each["version"], each["state"]) for each in status["versions"]] == [
        ("next", "warming"),
        ("1", "serving"),
    ]
    second = await ask(server, "POST", "/admin/models/m/swap", body)
    assert (second.status, second.error["reason"]) == (409, "model_busy")
    go_on.set()
    assert (await swapping).json()["version"] == "next"


async def test_who_leaves_while_it_swaps_does_not_stop_it(
    server: Server, other: FakeUpstream
) -> None:
    go_on = asyncio.Event()
    other.play(WELL, WELL, SLOTS, (go_on, WARM))
    connection = await server.connect()
    body = f'{{"upstream": "{other.url}"}}'.encode()
    head = f"POST /admin/models/m/swap HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    await connection.send(head.encode() + b"Authorization: Bearer the key\r\n\r\n" + body)
    await other.exchange(3)
    connection.reset()
    go_on.set()
    model = server.app[CONTEXT].models.find("m")
    await until(lambda: model.serving is not None and model.serving.config.version == "2")


async def test_a_swap_cannot_change_the_name(server: Server) -> None:
    refused = await ask(server, "POST", "/admin/models/m/swap", {"name": "n"})
    assert (refused.status, refused.error["reason"]) == (400, "invalid_model")


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/admin/models/x"), ("POST", "/admin/models/x/swap"), ("DELETE", "/admin/models/x")],
)
async def test_an_unknown_model_is_404(server: Server, method: str, target: str) -> None:
    refused = await ask(server, method, target, {} if method == "POST" else None)
    assert (refused.status, refused.error["reason"]) == (404, "model_not_found")
    assert refused.error["models"] == ["m"]


async def test_what_runs_longer_than_the_drain_may_take_is_cut_off_and_told(
    upstream: FakeUpstream, other: FakeUpstream
) -> None:
    model = ModelConfig("m", upstream=upstream.url)
    async with serving(models=[model], model_drain_timeout_s=0.05) as server:
        old = await begin(server, upstream, asyncio.Event())
        other.play(WELL, WELL, SLOTS, WARM)
        await ask(server, "POST", "/admin/models/m/swap", {"upstream": other.url})
        assert texts_of(await old.read_to_end()) == ["a", "model_unloaded"]
        await upstream.exchanges[0].wait_closed()


# --- a model less


async def test_a_removed_model_is_not_found_any_more_and_finishes_what_runs(
    server: Server, upstream: FakeUpstream
) -> None:
    end = asyncio.Event()
    old = await begin(server, upstream, end)
    removing = asyncio.create_task(ask(server, "DELETE", "/admin/models/m"))
    await until(lambda: not server.app[CONTEXT].models.known)
    refused = await server.fetch("POST", CHAT, json={})
    assert (refused.status, refused.error["reason"]) == (404, "model_not_found")
    assert (await server.fetch("GET", "/v1/models")).json()["data"] == []
    assert not removing.done()
    end.set()
    assert texts_of(await old.read_to_end()) == ["a", "[DONE]"]
    removed = await removing
    assert removed.status == 200
    assert removed.json()["versions"][0]["state"] == "stopped"
    assert (await ask(server, "GET", "/admin/models/m")).status == 404


async def test_a_key_is_nowhere_to_be_read(server: Server, other: FakeUpstream) -> None:
    other.play(WELL, WELL, SLOTS, WARM, WELL)
    body = {"name": "x", "upstream": other.url, "key": "sk-secret"}
    registered = await ask(server, "POST", "/admin/models", body)
    status = await ask(server, "GET", "/admin/models")
    assert b"sk-secret" not in registered.body + status.body
    assert other.exchanges[3].headers["authorization"] == "Bearer sk-secret"
