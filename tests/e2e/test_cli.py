"""``pyserve serve`` as a person and an init system use it: help, settings, errors, signals."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from llama import LONG, chat, new_conversation
from process import Process, Server, environment, pyserve, pyserve_command

from pyserve.config import settings

either_signal = pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])

#: Enough that a signal sent after the first one comes before the last one.
SOME_TOKENS = 2000


def run(*arguments: str | Path, **env: str) -> tuple[int, str]:
    """Exit status and output of a command that ends by itself."""
    with Process(pyserve_command(*arguments), environment(**env)) as process:
        status = process.wait()
    assert "Traceback" not in process.output
    return status, process.output


def test_help_shows_examples_and_every_setting_with_its_environment_variable() -> None:
    status, output = run("serve", "--help")
    assert status == 0
    assert "Examples:\n    pyserve serve " in output
    words = output.replace(";", " ").replace("]", " ").split()
    for setting in settings():
        assert setting.option in words
        assert setting.environment_variable in words


def test_version_is_the_package_s() -> None:
    assert run("--version") == (0, f"python -m pyserve.cli, version {version('pyserve')}\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "abc"], "'abc' is not a valid integer"),
        (["--port", "65536"], "port is 65536, the largest is 65535"),
        (["--port", "-1"], "port is -1, the smallest is 0"),
        (["--session-ttl", "nan"], "session_ttl_s is nan"),
        (["--session-ttl", "inf"], "session_ttl_s is inf"),
        (["--heartbeat-interval", "0"], "heartbeat_interval_s is 0.0, the smallest is 0.01"),
        (["--max-session-bytes", "4095"], "max_session_bytes is 4095, the smallest is 4096"),
        (["--max-session-bytes", "3XB"], "'3XB' is not a size such as 4096, 64KiB, 32MiB or 1GiB"),
        (["--max-session-bytes", "-4KiB"], "'-4KiB' is not a size"),
        (["--upstream", "localhost:8080"], "upstream must be an http:// or https:// URL"),
        (["--upstream", "http://user@host"], "upstream must be a plain URL"),
        (["--upstream", "http://127.0.0.1:9", "--demo"], "only one source of generations"),
        (["--model", "/nowhere.gguf"], "model: there is no file /nowhere.gguf"),
        (
            ["--upstream", "http://127.0.0.1:9", "--upstream-key-file", "/nowhere"],
            "upstream_key_file cannot be read: No such file or directory",
        ),
        (["--upstream", "a=localhost"], "a: upstream must be an http:// or https:// URL"),
        (["--model", "a=/nowhere.gguf"], "a: there is no file /nowhere.gguf"),
        (
            ["--upstream", "http://127.0.0.1:9", "--upstream", "http://127.0.0.1:8"],
            "--upstream: only one source of generations may go without a name",
        ),
        (
            ["--upstream", "http://127.0.0.1:9", "--upstream", "b=http://127.0.0.1:8"],
            "give each source of generations a name, or have only one",
        ),
        (["--max-priority", "urgent"], "'urgent' is not one of 'high', 'normal'"),
        (["--admin-key-file", "/nowhere"], "admin_key_file cannot be read"),
        (["--config", "/nowhere.toml"], "/nowhere.toml cannot be read: No such file"),
        (["--no-such-option"], "No such option '--no-such-option'"),
        (["argument"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_clear_error(arguments: list[str], complaint: str) -> None:
    status, output = run("serve", *arguments)
    assert status in (1, 2)
    last_line = output.splitlines()[-1]
    assert last_line.startswith("Error: ")
    assert complaint in last_line


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("65536", 65536), ("64KiB", 65536), ("64kib", 65536), ("1MiB", 2**20), ("1 GiB", 2**30)],
)
def test_sizes_may_have_units(size: str, size_bytes: int) -> None:
    _, output = run("serve", "--max-total-bytes", size, "--max-session-bytes", "2GiB")
    assert f"max_total_bytes ({size_bytes}) is less than max_session_bytes ({2**31})" in output


def test_environment_variables_are_settings_and_options_win_over_them() -> None:
    limits = {"PYSERVE_MAX_TOTAL_BYTES": "64KiB", "PYSERVE_MAX_SESSION_BYTES": "128KiB"}
    status, output = run("serve", **limits)
    assert status == 1
    assert "max_total_bytes (65536) is less than max_session_bytes (131072)" in output
    with pyserve("--max-session-bytes", "4KiB", env=environment(PYSERVE_PORT="1", **limits)):
        pass


async def test_sources_may_have_names(llama: Server, http: aiohttp.ClientSession) -> None:
    second = f"b={llama.url}"
    with pyserve("--upstream", f"a={llama.url}", "--upstream", second) as server:
        async with http.get(f"{server.url}/v1/models") as answer:
            told = (await answer.json())["data"]
    assert [model["id"] for model in told] == ["a", "b"]


async def test_an_environment_variable_may_name_several(http: aiohttp.ClientSession) -> None:
    env = environment(PYSERVE_UPSTREAM="a=http://127.0.0.1:9 b=http://127.0.0.1:9/x=y")
    with pyserve(env=env) as server:
        async with http.get(f"{server.url}/v1/models") as answer:
            told = (await answer.json())["data"]
    assert [model["id"] for model in told] == ["a", "b"]


def test_a_file_in_the_folder_is_read_and_options_and_variables_win_over_it(
    tmp_path: Path,
) -> None:
    file = tmp_path / "pyserve.toml"
    file.write_text('max_total_bytes = "64KiB"\nmax_session_bytes = "128KiB"\n')

    def complaint(*arguments: str, **env: str) -> str:
        with Process(
            pyserve_command("serve", *arguments), environment(**env), folder=tmp_path
        ) as process:
            assert process.wait() == 1
        return process.output

    assert "(65536) is less than max_session_bytes (131072)" in complaint()
    assert "(65536) is less than max_session_bytes (262144)" in complaint(
        PYSERVE_MAX_SESSION_BYTES="256KiB"
    )
    assert "(65536) is less than max_session_bytes (524288)" in complaint(
        "--max-session-bytes", "512KiB", PYSERVE_MAX_SESSION_BYTES="256KiB"
    )
    file.write_text("prot = 1\n")
    assert (
        complaint()
        == "Error: pyserve.toml: settings: there is no key 'prot', did you mean 'port'?\n"
    )


def test_a_wrong_environment_variable_is_named() -> None:
    status, output = run("serve", PYSERVE_PORT="abc")
    assert status == 2
    assert "(env var: 'PYSERVE_PORT'): 'abc' is not a valid integer" in output


def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, output = run("serve", "--port", str(port))
    assert status == 1
    assert output == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_without_a_source_it_serves_a_demo_and_says_so() -> None:
    with pyserve() as server:
        assert server.output.startswith("DEMO: no model is running.")


@asynccontextmanager
async def reading(
    http: aiohttp.ClientSession, server: Server, max_tokens: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A generation that has begun."""
    async with http.post(
        f"{server.url}/v1/chat/completions",
        json=chat(max_tokens),
        headers={"X-Conversation-Id": new_conversation()},
    ) as answer:
        await answer.content.readuntil(b"\n\n")
        yield answer


@either_signal
async def test_a_stop_signal_lets_a_running_generation_finish(
    llama: Server, http: aiohttp.ClientSession, stop_signal: signal.Signals
) -> None:
    with serving(llama) as server:
        async with reading(http, server, SOME_TOKENS) as answer:
            server.send(stop_signal)
            server.wait_for("stopping; running generations have 30 s to finish")
            with pytest.raises(aiohttp.ClientConnectorError):
                await http.get(f"{server.url}/health")
            log = await answer.read()
        assert b"data: [DONE]\n" in log
        assert log.endswith(b"\n\n: end completed\n")
        assert server.wait() == 0


@either_signal
async def test_without_time_to_drain_readers_are_told_of_the_shutdown(
    llama: Server, http: aiohttp.ClientSession, stop_signal: signal.Signals
) -> None:
    with serving(llama, "--drain-timeout", "0") as server:
        async with reading(http, server, LONG) as answer:
            server.send(stop_signal)
            log = await answer.read()  # to its clean end
        assert b'"reason":"shutdown"' in log
        assert b"[DONE]" not in log
        assert log.endswith(b"\n\n: end failed shutdown\n")
        assert server.wait() == 0


async def test_a_second_signal_ends_the_draining(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    with serving(llama) as server:
        async with reading(http, server, LONG) as answer:
            server.send(signal.SIGINT)
            server.wait_for("stopping; running generations have 30 s to finish")
            server.send(signal.SIGINT)
            assert (await answer.read()).endswith(b"\n\n: end failed shutdown\n")
        assert server.wait() == 0


async def test_a_second_run_right_after_listens_on_the_same_port(
    llama: Server, http: aiohttp.ClientSession
) -> None:
    with serving(llama, "--drain-timeout", "0") as server:
        async with reading(http, server, LONG) as answer:
            server.stop()
            await answer.read()
    port = server.url.rpartition(":")[2]
    with Server(pyserve_command("serve", "--port", port), environment()) as second:
        assert second.url == server.url
        assert second.stop() == 0


def serving(llama: Server, *arguments: str) -> Server:
    """pyserve, for a test that stops it."""
    command = pyserve_command("serve", "--port", "0", "--upstream", llama.url, *arguments)
    return Server(command, environment())


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: x\r\nX-Conversation-Id: a\x01b\r\n\r\n",
        "GET /ü HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /v1/streams/lookup HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "NONSENSE\r\n\r\n",
    ],
)
def test_what_the_parser_refuses_is_400_and_one_line_of_log(request_text: str) -> None:
    with pyserve("--demo") as server:
        address = (urlsplit(server.url).hostname, urlsplit(server.url).port)
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(request_text.encode())
            assert client.recv(12)[-3:] == b"400"
    assert "Traceback" not in server.output
