"""How ``pyserve ask``, ``attach`` and ``stop`` end: with a status, and one line that says why."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cutting_proxy import CuttingProxy
from fake_upstream import SSE_HEAD, STALL, FakeUpstream, answer, chunk, token
from process import environment, pyserve_command
from serving import Server, until
from terminal import run

from pyserve.cli import main
from pyserve.commands.running import ExitStatus


def add_tokens(server: Server, *words: str) -> None:
    session = server.manager.get("chat") or server.manager.create_or_replace("chat")
    for word in words:
        session.append(token(word))


# --- of a stream


async def test_a_failed_generation_is_1_with_its_message(server: Server) -> None:
    add_tokens(server, "Hel")
    server.session("chat").finalize("failed", "upstream_lost")
    async with run("attach", server.url, "chat") as attached:
        assert await attached.exit_status() == 1
    assert attached.out.text == "Hel"
    message = "the generation failed: The connection to the upstream was lost (upstream_lost)"
    assert attached.err.text == f"pyserve: {message}\n"


async def test_a_stream_that_is_stopped_is_4_and_one_that_is_gone_is_3(server: Server) -> None:
    add_tokens(server, "Hel")
    async with run("attach", server.url, "chat") as attached:
        await attached.out.wait_for("Hel")
        async with run("stop", server.url, "chat") as stopped:
            await stopped.finished()
        assert await attached.exit_status() == 4
    assert attached.err.text == "pyserve: stopped\n"
    for command in ("attach", "stop"):
        async with run(command, server.url, "chat") as late:
            assert await late.exit_status() == 3
        assert re.fullmatch("Error: there is no .*\n", late.err.text)


async def test_stop_can_keep_what_was_written(server: Server) -> None:
    add_tokens(server, "Hel")
    async with run("stop", "--keep", server.url, "chat") as stopped:
        await stopped.finished()
    assert server.session("chat").state == "cancelled"
    async with run("attach", server.url, "chat") as attached:
        assert await attached.exit_status() == 4
    assert attached.out.text == "Hel"


async def test_a_server_that_is_not_there_or_no_pyserve_is_5(upstream: FakeUpstream) -> None:
    upstream.play(answer(404, b"<html>nginx</html>"))
    async with run("attach", "http://127.0.0.1:1", "chat") as attached:
        assert await attached.exit_status() == 5
    message = "cannot connect to http://127.0.0.1:1: connection refused"
    assert attached.err.text == f"Error: {message}\n"
    async with run("ask", upstream.url, "Hi") as asked:
        assert await asked.exit_status() == 5
    assert re.fullmatch(f"Error: {upstream.url} answers 404: not a pyserve\n", asked.err.text)


async def test_a_server_that_stays_away_is_5(server: Server, proxy: CuttingProxy) -> None:
    add_tokens(server, "Hel")
    async with run("attach", "--give-up-after", "0.3", proxy.url, "chat") as attached:
        await attached.out.wait_for("Hel")
        await proxy.refuse()
        assert await attached.exit_status() == 5
    assert attached.err.text.splitlines()[-1].startswith("Error: ")
    await proxy.listen()


async def test_ctrl_c_before_the_answer_says_that_nothing_is_certain(
    generating: Server, upstream: FakeUpstream
) -> None:
    upstream.play((STALL,))
    async with run("ask", generating.url, "--id", "chat", "Hi") as asked:
        await upstream.exchange()
        asked.interrupt()
        assert await asked.exit_status() == 130
    first, second = asked.err.text.splitlines()
    assert "interrupted before the server answered" in first
    assert second == f"  pyserve attach {generating.url} chat"


async def test_an_error_that_the_upstream_put_into_a_stream_it_ended_is_1(server: Server) -> None:
    session = server.manager.create_or_replace("c")
    session.append_event('{"choices":[{"delta":{"content":"partial"}}]}')
    session.append_event('{"error":{"message":"slot \\u001b]0;x\\u0007failed"}}')
    session.finalize()
    async with run("attach", server.url, "c") as attached:
        assert await attached.exit_status() == 1
    assert attached.out.text == "partial"
    error = "the generation ended with an error: slot \N{REPLACEMENT CHARACTER}]0;x"
    assert attached.err.text == f"pyserve: {error}\N{REPLACEMENT CHARACTER}failed\n"


async def test_a_stream_that_is_replaced_is_4_whenever_that_is_met(
    server: Server, proxy: CuttingProxy
) -> None:
    add_tokens(server, "Hel")
    async with (
        run("attach", server.url, "chat") as there,
        run("attach", proxy.url, "chat") as away,
    ):
        await there.out.wait_for("Hel")
        await away.out.wait_for("Hel")
        await proxy.refuse()
        server.manager.create_or_replace("chat")
        await proxy.listen()
        assert await there.exit_status() == 4
        assert await away.exit_status() == 4
    assert away.err.text.splitlines()[-1] == "Error: the stream was replaced by a newer one"


# --- of a pipeline


async def piped(*arguments: str) -> asyncio.subprocess.Process:
    """``pyserve ARGUMENTS | head -c 5``, whose status is that of pyserve."""
    command = shlex.join(map(str, pyserve_command(*arguments)))
    return await asyncio.create_subprocess_exec(
        *("bash", "-o", "pipefail", "-c", f"{command} | head -c 5"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )


@pytest.mark.parametrize("options", [[], ["--raw"]])
async def test_a_pipe_that_nobody_reads_any_more_ends_it_quietly(
    server: Server, options: list[str]
) -> None:
    add_tokens(server, "Hello")
    process = await piped("attach", *options, server.url, "chat")
    ending = asyncio.create_task(process.communicate())

    def ended() -> bool:
        add_tokens(server, "more")  # until one meets the closed pipe
        return ending.done()

    await until(ended)
    output, errors = await ending
    assert (process.returncode, len(output), errors) == (141, 5, b"")
    assert server.session("chat").is_live


async def test_a_question_whose_answer_nobody_reads_any_more_goes_on(
    generating: Server, upstream: FakeUpstream
) -> None:
    upstream.play((SSE_HEAD, *[chunk(token("Hello"))] * 10_000, STALL))
    process = await piped("ask", "--id", "chat", generating.url, "Hi")
    async with asyncio.timeout(15):
        output, errors = await process.communicate()
    told = (process.returncode, output, errors)
    assert told == (141, b"Hello", b"conversation: chat\n")
    assert generating.session("chat").is_live


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("options", [[], ["--raw"]])
async def test_output_that_cannot_be_written_is_one_line_and_the_way_back(
    server: Server, options: list[str]
) -> None:
    add_tokens(server, "Hello")
    with Path("/dev/full").open("wb") as full:
        process = await asyncio.create_subprocess_exec(
            *map(str, pyserve_command("attach", *options, server.url, "chat")),
            stdout=full,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
        )
        _, errors = await process.communicate()
    first, *way_back = errors.decode().splitlines()
    assert first == "Error: the output cannot be written: No space left on device"
    assert any("pyserve attach" in line for line in way_back)
    assert process.returncode == 74
    assert server.session("chat").is_live


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
async def test_what_it_needs_and_is_closed_is_named(server: Server, closed: str) -> None:
    command = shlex.join(map(str, pyserve_command("ask", server.url, "-")))
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f"{command} {closed}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert b"which is closed" in errors


# --- of wrong usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["attach"],
        ["attach", "http://127.0.0.1:1", "http://127.0.0.1:2", "chat"],
        ["attach", "two", "words"],
        ["attach", "--url", "http://127.0.0.1:1", "http://127.0.0.1:1", "chat"],
        ["attach", "--url", "gopher://x", "chat"],
        ["attach", "http://127.0.0.1:99999", "chat"],
        ["attach", "http://[::1", "chat"],
        ["attach", "http://a..b", "chat"],
        ["attach", "--from", "-1", "chat"],
        ["attach", "--api-key", "two\nlines", "chat"],
        ["ask", "forgot", "the", "quotes"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 2
    assert told.stderr.startswith("Usage: ")
    assert "Error: " in told.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (["ask", "x\udcff"], {}, "'[URL] TEXT': it is not UTF-8, at character 2."),
        (["attach", "x\udcff"], {}, "'[URL] CONVERSATION': it is not UTF-8, at character 2."),
        (["stop", "\udcff"], {}, "'[URL] CONVERSATION': it is not UTF-8, at character 1."),
        (["ask", "--model", "\udcff", "Hi"], {}, "'--model': it is not UTF-8"),
        (["ask", "--id", "\udcff", "Hi"], {}, "'--id': it is not UTF-8"),
        (["attach", "--from", "\udcff", "chat"], {}, "is not an offset"),
        (["stop", "--url", "http://\udcff", "chat"], {}, "'--url'"),
        (["stop", "chat"], {"PYSERVE_URL": "http://\udcff"}, "'--url'"),
        (["stop", "chat"], {"PYSERVE_API_KEY": "\udcff"}, "'--api-key'"),
    ],
)
async def test_bytes_that_are_no_text_are_named(
    arguments: list[str], variables: dict[str, str], named: str
) -> None:
    async with run(*arguments, **variables) as refused:
        assert await refused.exit_status() == 2
    assert named in refused.err.text.splitlines()[-1]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
async def test_a_question_on_stdin_that_is_no_text_is_refused(
    upstream: FakeUpstream, locale: str
) -> None:
    async with run("ask", upstream.url, "-", stdin=b"caf\xe9", LC_ALL=locale) as asked:
        assert await asked.exit_status() == 2
    assert "The question on stdin is not UTF-8, at byte 4." in asked.err.text
    assert upstream.exchanges == []


# --- and where to read about it


@pytest.mark.parametrize("command", ["ask", "attach", "stop"])
def test_help_lists_every_status(command: str) -> None:
    told: Any = CliRunner().invoke(main, [command, "--help"])
    for status in ExitStatus:
        assert re.search(rf"^ +{status.value} +{re.escape(status.words)}$", told.output, re.M)
