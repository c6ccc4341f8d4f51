"""``pyserve ask``, ``attach`` and ``stop`` as processes."""

from __future__ import annotations

import asyncio
import re
import shlex

import orjson
import pytest
from cutting_proxy import Cut, CuttingProxy
from fake_upstream import LAST_CHUNK, SSE_HEAD, FakeUpstream, answer, chunk, stream, token
from process import pyserve as pyserve_server
from serving import Server, serving
from terminal import run

DONE = b"data: [DONE]\n\n"
WORDS = ["Hello", ", ", "wörld", " 🙂"]
TEXT = "".join(WORDS)
HELLO = [*map(token, WORDS), DONE]


def url_of(server: Server) -> str:
    host, port = server.runner.addresses[0][:2]
    return f"http://{host}:{port}"


def add_tokens(server: Server, *words: str, conversation_id: str = "chat") -> None:
    session = server.manager.get(conversation_id)
    session = session or server.manager.create_or_replace(conversation_id)
    for word in words:
        session.append(token(word))


# --- ask


async def test_ask_prints_the_answer_and_names_the_conversation(
    generating: Server, upstream: FakeUpstream
) -> None:
    upstream.play(stream(*HELLO))
    async with run("ask", url_of(generating), "--model", "small", "What's up?") as asked:
        await asked.finished()
    assert asked.out.text == TEXT
    named = re.fullmatch(r"conversation: (\w+)\n", asked.err.text)
    assert named
    assert generating.session(named[1]).state == "completed"
    sent = orjson.loads((await upstream.exchange()).body)
    assert sent == {
        "messages": [{"role": "user", "content": "What's up?"}],
        "model": "small",
        "stream": True,
    }


async def test_ctrl_c_leaves_the_generation_running_and_says_how_to_come_back(
    generating: Server, upstream: FakeUpstream
) -> None:
    going_on = asyncio.Event()
    upstream.play((SSE_HEAD, chunk(HELLO[0]), going_on, *map(chunk, HELLO[1:]), LAST_CHUNK))
    async with run(
        "ask", "--id", "my notes", "-", stdin=b"Hi", PYSERVE_URL=url_of(generating)
    ) as asked:
        await asked.out.wait_for("Hello")
        asked.interrupt()
        assert await asked.exit_status() == 130
    assert "the generation goes on" in asked.err.text
    assert generating.session("my notes").is_live
    going_on.set()
    hint = shlex.split(asked.err.text.splitlines()[-1])
    assert hint[:2] == ["pyserve", "attach"]
    async with run(*hint[1:]) as attached:
        await attached.finished()
    assert asked.out.text + attached.out.text == TEXT
    assert attached.err.text == ""


async def test_ask_does_not_replace_what_is_being_written(
    generating: Server, upstream: FakeUpstream
) -> None:
    add_tokens(generating, "live")
    async with run("ask", url_of(generating), "--id", "chat", "Hi") as asked:
        assert await asked.exit_status() == 1
    assert asked.err.text.startswith("Error: this conversation is being answered")
    assert generating.session("chat").is_live


async def test_a_request_that_the_server_refuses_is_one_line(
    generating: Server, upstream: FakeUpstream
) -> None:
    upstream.play(answer(400, {"error": {"code": 400, "message": "the prompt is too long"}}))
    async with run("ask", url_of(generating), "Hi") as asked:
        assert await asked.exit_status() == 1
    assert asked.err.text == "Error: the prompt is too long (upstream_error)\n"


# --- attach


async def test_attach_follows_through_drops_with_a_short_word_about_each(
    server: Server, proxy: CuttingProxy
) -> None:
    add_tokens(server, WORDS[0])
    proxy.cuts += [Cut(b"Hello"), Cut(b"w\xc3")]
    async with run("attach", proxy.url, "chat") as attached:
        await attached.out.wait_for(WORDS[0])
        add_tokens(server, *WORDS[1:])
        await attached.out.wait_for(WORDS[-1])
        server.session("chat").finalize()
        await attached.finished()
    assert attached.out.text == TEXT
    told = attached.err.text.splitlines()
    assert [re.sub(r"[0-9]+|\(.*\)|:.*", "", line) for line in told] == ["pyserve"] * len(told)
    assert len(told) == 4
    assert told[0].endswith("; trying again")
    assert re.fullmatch(r"pyserve: attached again at byte [0-9]+", told[3])


async def test_raw_is_the_log_to_the_byte(server: Server, proxy: CuttingProxy) -> None:
    add_tokens(server, *WORDS)
    session = server.session("chat")
    session.finalize()
    log = b"".join([block async for block in session.read_from(0)])
    proxy.cuts += [Cut(b"w\xc3"), Cut(40)]
    async with run(
        "attach", "--raw", "--from", f"{session.epoch}-11", proxy.url, "chat"
    ) as attached:
        await attached.finished()
    assert attached.out.raw == log[11:]


@pytest.mark.parametrize("form", ["argument", "option", "environment", "argument over environment"])
async def test_the_server_is_named_in_front_by_option_or_by_the_environment(
    server: Server, form: str
) -> None:
    add_tokens(server, TEXT)
    server.session("chat").finalize()
    url = url_of(server)
    arguments, variables = {
        "argument": ([url, "chat"], {}),
        "option": (["--url", url, "chat"], {}),
        "environment": (["chat"], {"PYSERVE_URL": url}),
        "argument over environment": ([url, "chat"], {"PYSERVE_URL": "http://127.0.0.1:1"}),
    }[form]
    async with run("attach", *arguments, **variables) as attached:
        await attached.finished()
    assert attached.out.text == TEXT


async def test_on_a_terminal_thoughts_are_dimmed_and_nothing_moves_the_cursor(
    server: Server,
) -> None:
    session = server.manager.create_or_replace("chat")
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}
    session.append_event(orjson.dumps(thought).decode())
    add_tokens(server, "a\x1b[2Jb")
    session.finalize()
    async with run("attach", url_of(server), "chat", terminal=True) as attached:
        await attached.finished()
    assert attached.out.text == "\x1b[2mhm\x1b[0m\r\n\r\na\N{REPLACEMENT CHARACTER}[2Jb\r\n"
    async with run("attach", url_of(server), "chat") as attached:
        await attached.finished()
    assert attached.out.text == "a\x1b[2Jb"  # a file gets the answer, as it is


async def test_on_a_terminal_crlf_is_a_line_end_wherever_tokens_part_it(server: Server) -> None:
    add_tokens(server, "one\r\ntwo\r", "\nthree\rfour")
    server.session("chat").finalize()
    async with run("attach", url_of(server), "chat", terminal=True) as attached:
        await attached.finished()
    assert attached.out.text == "one\r\ntwo\r\nthree\N{REPLACEMENT CHARACTER}four\r\n"


async def test_bytes_that_are_no_longer_kept_are_told_and_never_missing_from_raw() -> None:
    async with serving(max_session_bytes=4096) as server:
        session = server.manager.create_or_replace("chat")
        for number in range(200):
            session.append_event(f"line {number}")
        session.finalize()
        async with run("attach", url_of(server), "chat") as attached:
            await attached.finished()
        assert attached.out.text.endswith("line 198\nline 199\n")
        assert f"[bytes 0 to {session.dropped_prefix} are no longer kept]" in attached.err.text
        async with run("attach", "--raw", url_of(server), "chat") as attached:
            assert await attached.exit_status() == 3
        assert f"--from earliest begins at byte {session.dropped_prefix}" in attached.err.text
        assert attached.out.raw == b""


# --- both


async def test_a_bearer_key_is_sent(upstream: FakeUpstream) -> None:
    upstream.play(answer(401, {"error": {"reason": "unauthorized", "message": "Wrong key"}}))
    async with run("attach", upstream.url, "chat", PYSERVE_API_KEY="s3cret") as attached:
        assert await attached.exit_status() == 1
    assert attached.err.text == "Error: Wrong key (unauthorized)\n"
    assert (await upstream.exchange()).headers["authorization"] == "Bearer s3cret"


async def test_the_demo_can_be_asked_left_followed_and_stopped() -> None:
    with pyserve_server("--demo") as demo:
        async with run("ask", demo.url, "--id", "tour", "What is this?") as asked:
            await asked.out.wait_for("This is pyserve's demo")
            asked.interrupt()
            assert await asked.exit_status() == 130
        async with run("attach", demo.url, "tour") as attached:
            await attached.out.wait_for(asked.out.text)
            async with run("stop", demo.url, "tour") as stopped:
                await stopped.finished()
            assert await attached.exit_status() == 4
