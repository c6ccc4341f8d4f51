"""Models of real llama.cpps: swapped under load, broken, killed; named on the command line, in a
file, and in a program of one's own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from llama import chat, new_conversation
from process import Server, environment, pyserve
from tiny_gguf import write_tiny_model

from pyserve import ConfigError, InferenceServer, ModelConfig

KEY = {"Authorization": "Bearer the key"}
PATIENCE_S = 30.0
STREAMS = 8

#: What the two models speak: words that begin with other letters.
ONE, TWO = "bdk", "rst"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return (
        write_tiny_model(folder / "one.gguf", initials=ONE),
        write_tiny_model(folder / "two.gguf", initials=TWO, seed=1),
    )


@pytest.fixture
def server(files: tuple[Path, Path]) -> Iterator[Server]:
    """pyserve with the first model, which has four slots."""
    with pyserve(
        *("--model", f"m={files[0]}", "--model-slots", "4", "--model-context-tokens", "16384"),
        *("--health-interval", "0.2"),
        env=environment(PYSERVE_ADMIN_KEY="the key"),
    ) as running:
        yield running


def question(max_tokens: int, seed: int = 1) -> dict[str, Any]:
    return {**chat(max_tokens, seed=seed), "logit_bias": [], "model": "m"}


async def ask(http: aiohttp.ClientSession, url: str, max_tokens: int, seed: int = 1) -> str:
    """The text of a kept stream, which must be whole."""
    headers = {"X-Conversation-Id": new_conversation()}
    async with http.post(
        f"{url}/v1/chat/completions", json=question(max_tokens, seed), headers=headers
    ) as answer:
        log = await answer.read()
        assert answer.status == 200, log
    assert log.endswith(b"\n\n: end completed\n"), log[-500:]
    chunks = [orjson.loads(line) for line in re.findall(rb"^data: (\{.*)$", log, re.MULTILINE)]
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
    )


def speaker(text: str) -> str:
    """Which of the two models said all of this."""
    initials = {word[0] for word in text.split()}
    assert initials
    (said_by,) = {"one" if initials <= set(ONE) else "", "two" if initials <= set(TWO) else ""} - {
        ""
    }
    return said_by


async def admin(
    http: aiohttp.ClientSession, server: Server, method: str, path: str, body: Any = None
) -> tuple[int, Any]:
    url = f"{server.url}/admin/models{path}"
    async with http.request(method, url, json=body, headers=KEY) as answer:
        return answer.status, await answer.json()


async def state_of_the_oldest(http: aiohttp.ClientSession, server: Server) -> str:
    _, told = await admin(http, server, "GET", "/m")
    return told["versions"][-1]["state"]


def children_of(server: Server) -> list[int]:
    text = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


async def test_a_swap_under_load_fails_nothing_mixes_nothing_and_makes_nobody_wait(
    server: Server, files: tuple[Path, Path], http: aiohttp.ClientSession
) -> None:
    told: list[list[str]] = [[] for _ in range(STREAMS)]
    stop = asyncio.Event()

    async def go_on_asking(stream: int) -> None:
        while not stop.is_set():
            told[stream].append(speaker(await ask(http, server.url, 40, seed=stream)))

    asking = [asyncio.create_task(go_on_asking(stream)) for stream in range(STREAMS)]

    async def wait_for_answers(more: int) -> None:
        wanted = [len(each) + more for each in told]
        async with asyncio.timeout(PATIENCE_S):
            while any(len(each) < count for each, count in zip(told, wanted, strict=True)):
                await asyncio.sleep(0.01)
                for task in asking:
                    assert not task.done() or task.result()

    await wait_for_answers(2)
    before = [len(each) for each in told]
    status, swapped = await admin(http, server, "POST", "/m/swap", {"file": str(files[1])})
    during = [len(each) - count for each, count in zip(told, before, strict=True)]
    assert (status, swapped["version"]) == (200, "2")
    await wait_for_answers(3)
    stop.set()
    await asyncio.gather(*asking)

    # While the new one was loaded, everybody was answered by the old one.
    assert min(during) >= 1, during
    for each in told:
        assert each == sorted(each), each  # first the one, then the other
        assert (each[0], each[-1]) == ("one", "two")
    async with asyncio.timeout(PATIENCE_S):
        while await state_of_the_oldest(http, server) != "stopped":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    if sys.platform == "linux":
        assert len(children_of(server)) == 1


@pytest.mark.parametrize("content", ["half", b"not a model"], ids=["half a file", "another file"])
async def test_a_swap_to_a_broken_file_changes_nothing_and_says_why(
    server: Server,
    files: tuple[Path, Path],
    http: aiohttp.ClientSession,
    tmp_path: Path,
    content: bytes | str,
) -> None:
    broken = tmp_path / "broken.gguf"
    if isinstance(content, str):
        content = files[1].read_bytes()[: files[1].stat().st_size // 2]
    broken.write_bytes(content)
    asking = asyncio.create_task(ask(http, server.url, 2000))
    status, refused = await admin(http, server, "POST", "/m/swap", {"file": str(broken)})
    assert status == 502
    assert refused["error"]["reason"] == "model_load_failed"
    assert re.search(r"corrupted or incomplete|is not a GGUF file", refused["error"]["detail"])
    assert speaker(await asking) == "one"
    assert speaker(await ask(http, server.url, 20)) == "one"
    _, told = await admin(http, server, "GET", "/m")
    assert (told["version"], told["healthy"]) == ("1", True)
    assert [version["state"] for version in told["versions"]] == ["failed", "serving"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
async def test_who_waits_when_llama_cpp_is_killed_is_served_by_the_next_one(
    server: Server, http: aiohttp.ClientSession
) -> None:
    long = [
        asyncio.create_task(
            http.post(
                f"{server.url}/v1/chat/completions",
                json=question(3000, seed),
                headers={"X-Conversation-Id": new_conversation()},
            )
        )
        for seed in range(4)
    ]
    running = [await task for task in long]
    for answer in running:
        await answer.content.readuntil(b"\n\n")
    waiting = [asyncio.create_task(ask(http, server.url, 10)) for _ in range(3)]

    async def told() -> dict[str, Any]:
        async with http.get(f"{server.url}/v1/models") as answer:
            return (await answer.json())["data"][0]

    async with asyncio.timeout(PATIENCE_S):
        while (await told())["waiting"] != 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        (child,) = children_of(server)
        os.kill(child, signal.SIGKILL)
        for answer in running:
            assert (await answer.read()).endswith(b": end failed upstream_lost\n")
        while (await told())["status"] != "unhealthy":  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        assert {speaker(text) for text in await asyncio.gather(*waiting)} == {"one"}
    assert (await told())["status"] == "serving"


async def test_a_model_is_added_and_removed_while_it_serves(
    server: Server, files: tuple[Path, Path], http: aiohttp.ClientSession
) -> None:
    body = {
        "name": "two",
        "file": str(files[1]),
        "slots": 3,
        "context_tokens": 2048,
        "cache_type_k": "q8_0",
        "cache_type_v": "q8_0",
        "params": {"max_tokens": 5},
    }
    status, added = await admin(http, server, "POST", "", body)
    assert (status, added["versions"][0]["slots"]) == (201, 3)
    url = f"{server.url}/v1/chat/completions"
    short = {"model": "two", "messages": [{"role": "user", "content": "x"}]}
    async with http.post(url, json=short) as answer:
        told = await answer.json()
    assert told["usage"]["completion_tokens"] == 5
    assert speaker(told["choices"][0]["message"]["content"]) == "two"
    status, removed = await admin(http, server, "DELETE", "/two")
    assert (status, removed["versions"][0]["state"]) == (200, "stopped")
    async with http.post(url, json=short) as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["models"] == ["m"]


async def test_models_of_a_file(
    files: tuple[Path, Path], http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    config = tmp_path / "pyserve.toml"
    config.write_text(
        f"""
        session_ttl_s = 7.0
        [[models]]
        name = "one"
        file = "{os.path.relpath(files[0], tmp_path)}"
        [[models]]
        name = "demo"
        demo = true
        """
    )
    with pyserve("--config", config) as server:
        assert server.output.startswith("Loading one.gguf\n")
        async with http.get(f"{server.url}/v1/models") as answer:
            models = (await answer.json())["data"]
        assert [model["id"] for model in models] == ["one", "demo"]
        assert models[0]["slots"] >= 1  # as many as llama.cpp says
        body = {"prompt": "x", "model": "demo"}
        async with http.post(f"{server.url}/v1/completions", json=body) as answer:
            assert "pyserve's demo" in await answer.text()


async def test_in_a_program_of_one_s_own(
    files: tuple[Path, Path], http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    server = InferenceServer(request_timeout_s=60.0)
    server.register_model(ModelConfig("m", "1", file=files[0], slots=2))
    with pytest.raises(ConfigError, match="two models of the name m"):
        server.register_model(ModelConfig("m", "2", file=files[1]))
    await server.start("127.0.0.1", 0)
    async with server:
        assert speaker(await ask(http, server.url, 10)) == "one"
        await server.swap_model(ModelConfig("m", "2", file=files[1], slots=2))
        assert speaker(await ask(http, server.url, 10)) == "two"
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"no")
        with pytest.raises(ConfigError, match="is not a GGUF file"):
            await server.swap_model(ModelConfig("m", "3", file=broken))
        server.register_model(ModelConfig("more", demo=True))
        await server.wait_model("more")
        await server.unregister_model("m")
        async with http.get(f"{server.url}/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["more"]
        with pytest.raises(ConfigError, match="There is no such model"):
            await server.unregister_model("m")
