"""The page is quick, keeps still, runs nothing that it is sent, and is for everyone."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chat_page import Chat, until
from chromium import needs_chromium
from fake_upstream import FakeUpstream, stream, token
from main_thread import traced
from paced_upstream import paced_upstream
from playwright.async_api import Browser, BrowserContext, expect
from serving import serving

if TYPE_CHECKING:
    from conftest import OpenChat, Scene

pytestmark = [pytest.mark.asyncio(loop_scope="session"), needs_chromium]

TOKENS_PER_S = 60
SAMPLE = 10_000 if "PYSERVE_SOAK" in os.environ else 600

LONGEST_TASK_MS = 50
LARGEST_SHIFT = 0.01

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"

# As browsers count it for a page's visitors: without what a key or a click has moved.
WATCH_SHIFTS = """
    globalThis.shifts = [];
    new PerformanceObserver((list) => {
      for (const { value, hadRecentInput, sources } of list.getEntries())
        if (!hadRecentInput)
          shifts.push([value, ...sources.map(({ node }) => node?.id || node?.nodeName)]);
    }).observe({ type: "layout-shift", buffered: true });
"""

WATCH_VIOLATIONS = """
    globalThis.violations = [];
    addEventListener("securitypolicyviolation", (event) =>
      violations.push(event.violatedDirective));
"""


FOCUSED = "(({ id, ariaLabel, innerText }) => id || ariaLabel || innerText)(document.activeElement)"
LEFT_BELOW = "(it) => it.scrollHeight - it.scrollTop - it.clientHeight"


@asynccontextmanager
async def paced(tokens_per_s: float = TOKENS_PER_S) -> AsyncIterator[str]:
    """The address of a pyserve whose model writes Markdown at this pace."""
    async with paced_upstream(tokens_per_s) as upstream, serving(upstream=upstream.url) as server:
        host, port = server.runner.addresses[0][:2]
        yield f"http://{host}:{port}"


@pytest.mark.timeout(60 + 2 * SAMPLE / TOKENS_PER_S)
async def test_sixty_tokens_a_second_keep_it_responsive_and_nothing_moves(
    browser: Browser, profile: BrowserContext, open_chat: OpenChat, tell: Callable[[str], None]
) -> None:
    await profile.add_init_script(WATCH_SHIFTS)
    async with paced() as url:
        chat = await open_chat(url, tokens=SAMPLE, plain=False)
        async with traced(browser, chat.page) as main_thread:
            await chat.ask()
            await expect(chat.status).to_have_text("Streaming")
            await chat.prompt.fill("typed while it streams")
            await expect(chat.status).to_have_text(
                "Complete", timeout=1500 * SAMPLE / TOKENS_PER_S + 10_000
            )
        shifts = await chat.page.evaluate("shifts")
        streamed = await chat.answer.inner_text()
        await chat.page.reload()
        await chat.is_in("completed")
        assert await chat.answer.inner_text() == streamed  # what is drawn bit by bit, and at once
    busy_ms = sum(main_thread.tasks_ms)
    tell(
        f"{SAMPLE:,} tokens at {TOKENS_PER_S}/s: longest task {main_thread.longest_ms:.1f} ms,"
        f" {busy_ms / SAMPLE:.2f} ms a token, layout shift {sum(s[0] for s in shifts):.4f}"
    )
    assert main_thread.seconds > (SAMPLE - 1) / TOKENS_PER_S  # and the trace is whole
    assert main_thread.longest_ms < LONGEST_TASK_MS
    assert sum(shift[0] for shift in shifts) < LARGEST_SHIFT, shifts


async def test_what_the_model_says_is_text_and_the_policy_holds(
    profile: BrowserContext, open_chat: OpenChat
) -> None:
    await profile.add_init_script(WATCH_VIOLATIONS)
    hostile = (
        '<script>document.title = "taken"</script>',
        "<img src=x onerror='document.title = \"taken\"'>",
        "\n\n[a link](javascript:document.title='taken') ",
        "![a picture](https://example.invalid/spy.png)\n\n<iframe srcdoc=x></iframe>",
    )
    async with FakeUpstream() as upstream:
        upstream.play(stream(*map(token, hostile), b"data: [DONE]\n\n"))
        async with serving(upstream=upstream.url) as server:
            host, port = server.runner.addresses[0][:2]
            chat = await open_chat(f"http://{host}:{port}", plain=False)
            await chat.ask('<b id="bold">hello</b>')
            await chat.is_in("completed")
    await expect(chat.answer).to_contain_text(hostile[0])
    await expect(chat.answer).to_contain_text(hostile[1])
    await expect(chat.answer.locator("script, img, iframe, [href^=javascript]")).to_have_count(0)
    await expect(chat.page.locator("#bold")).to_have_count(0)
    await expect(chat.page).to_have_title(re.compile('^<b id="bold">hello</b> '))
    assert await chat.page.evaluate("violations") == []


async def test_a_reader_who_scrolled_up_is_left_there(open_chat: OpenChat) -> None:
    async with paced(200) as url:
        chat = await open_chat(url, tokens=500, plain=False)
        await chat.ask()
        scroller = chat.page.locator("#scroller")
        await expect(chat.answer.locator("pre")).to_have_count(1)  # about half of a screen
        await expect(chat.answer.locator("pre")).to_have_count(2)
        await scroller.hover()
        await chat.page.mouse.wheel(0, -10_000)

        async def at_the_start() -> bool:
            return await scroller.evaluate("(it) => it.scrollTop") == 0

        await until(at_the_start, "the start of the text")  # wheels turn smoothly
        await expect(chat.answer.locator("pre")).to_have_count(3)
        assert await at_the_start()

        async def at_the_end() -> bool:
            await chat.page.mouse.wheel(0, 10_000)
            return await scroller.evaluate(LEFT_BELOW) < 2

        await until(at_the_end, "the end of the text")
        await chat.is_in("completed")
        assert await scroller.evaluate(LEFT_BELOW) < 2


async def test_all_of_it_is_done_by_keyboard(scene: Scene, open_chat: OpenChat) -> None:
    chat = await open_chat(scene.wire.url)
    await chat.page.reload()  # the focus is nowhere yet
    press = chat.page.keyboard.press
    walked = []
    for _ in range(6):
        await press("Tab")
        walked.append(await chat.page.evaluate(FOCUSED))
    assert walked == ["Skip to the message box", "new", "Options", "scroller", "prompt", "send"]
    await chat.page.evaluate("document.activeElement.blur()")

    scene.gate.hold(after_events=20)
    await chat.prompt.focus()
    await chat.page.keyboard.type("one line")
    await press("Shift+Enter")
    await chat.page.keyboard.type("and another")
    await press("Enter")
    log = await scene.follow(chat)
    await scene.let(20, log, chat)
    await expect(chat.page.get_by_test_id("question")).to_have_text("one line\nand another")
    await expect(chat.prompt).to_be_focused()
    await expect(chat.prompt).to_have_value("")
    await press("Escape")
    await chat.is_in("cancelled")
    assert await chat.text() == await log.whole()

    await scene.gate.open()
    await press("Shift+Tab")
    await expect(chat.retry).to_be_focused()
    await press("Enter")
    await chat.is_in("completed")
    await expect(chat.prompt).to_be_focused()
    assert await chat.text() == await (await scene.follow(chat)).whole()


async def test_a_screen_reader_is_told_sentences_and_the_end(open_chat: OpenChat) -> None:
    async with paced(200) as url:
        chat = await open_chat(url, tokens=60, plain=False)
        region = chat.page.locator("[aria-live=polite]#announcer")
        await expect(chat.page.get_by_role("status")).to_have_text("")
        await chat.ask()
        await expect(chat.article).to_have_attribute("aria-busy", "true")
        await chat.is_in("completed")
        await expect(chat.article).to_have_attribute("aria-busy", "false")
        await expect(chat.page.get_by_role("status")).to_have_text("Complete")
        await expect(region).to_contain_text("Ask for an answer under a name of your own.")
        assert await region.locator("p").count() < 10  # and not each token


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Chat]:
    """The page in a browser of another kind."""
    async with AsyncExitStack() as stack:
        context = await browser.new_context(reduced_motion="reduce", **options)
        stack.push_async_callback(context.close)
        if AXE.exists():
            await context.add_init_script(path=AXE)
        yield await Chat.open(context, url)


PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}


@pytest.mark.skipif(not AXE.exists() and "CI" not in os.environ, reason="needs npm install")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", [{}, PHONE], ids=["desktop", "phone"])
async def test_axe_finds_nothing(browser: Browser, scheme: str, kind: dict[str, Any]) -> None:
    async def check(chat: Chat, when: str) -> None:
        found = await chat.page.evaluate("axe.run({ resultTypes: ['violations'] })")
        assert [
            (when, violation["id"], [node["html"] for node in violation["nodes"]])
            for violation in found["violations"]
        ] == []

    async with paced(1000) as url, opened(browser, url, color_scheme=scheme, **kind) as chat:
        await check(chat, "before")
        await chat.set_options(plain=False, max_tokens=150)
        await chat.ask()
        await chat.is_in("completed")
        await check(chat, "completed")
        await chat.page.locator("#options summary").click()
        await check(chat, "options")
        await chat.page.keyboard.press("Escape")
        if kind:
            await chat.page.get_by_role("button", name="Conversations").click()
            await expect(chat.page.locator("#new")).to_be_visible()
            await check(chat, "list")
            await chat.page.keyboard.press("Escape")
        await chat.set_options(plain=False, max_tokens=100_000)
        await chat.ask()
        await chat.is_in("streaming")
        await check(chat, "streaming")
        await chat.stop.click()
        await chat.is_in("cancelled")
        await check(chat, "cancelled")


async def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser) -> None:
    async with paced(1000) as url, opened(browser, url, **PHONE) as chat:
        await chat.set_options(plain=False, max_tokens=300)
        await chat.ask("a-word-without-any-place-to-break-it" * 5)
        await chat.is_in("completed")
        for selector in ("html", "body", "#main", "#scroller", "#messages", "footer"):
            widths = await chat.page.locator(selector).evaluate(
                "(it) => [it.scrollWidth, it.clientWidth]"
            )
            assert widths[0] <= widths[1], selector
        for button in (chat.prompt, chat.send):
            box = await button.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert box["height"] >= 44  # a fingertip
