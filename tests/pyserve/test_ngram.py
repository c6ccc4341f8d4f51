"""The n-gram model: alone, in a batch, and behind the demo's OpenAI-compatible route."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import orjson
import pytest

from pyserve import ApiError
from pyserve.producers import demo
from pyserve.producers.batch import Batcher, Token
from pyserve.producers.demo_text import NOTES, TOUR
from pyserve.producers.ngram import NgramModel, NgramRequest, NgramState

TEXT = TOUR + "\n" + NOTES


@pytest.fixture(scope="module")
def model() -> NgramModel:
    return NgramModel(TEXT)


def alone(model: NgramModel, request: NgramRequest) -> list[Token]:
    """What the model says when nobody else is there."""
    state = model.start(request)
    tokens = model.step([state])
    while tokens[-1].finish_reason is None:
        tokens += model.step([state])
    return tokens


def text_of(tokens: Sequence[Token]) -> str:
    return "".join(token.text for token in tokens)


def test_it_says_sentences_of_words_it_has_read_up_to_the_end_of_a_paragraph(
    model: NgramModel,
) -> None:
    beginnings = {paragraph.split()[0] for paragraph in TEXT.split("\n\n")}
    texts = []
    for seed in range(40):
        tokens = alone(model, NgramRequest("", seed, temperature=0.5))
        assert tokens[-1] == Token("", "stop")
        texts.append(text_of(tokens))
    assert {word for text in texts for word in text.split()} <= set(TEXT.split())
    assert sum(text.split()[0] in beginnings and text.endswith(".") for text in texts) >= 38
    assert len(set(texts)) > 30


def test_it_continues_a_prompt_whose_end_it_knows(model: NgramModel) -> None:
    (first, *_) = alone(model, NgramRequest("They say that the network is not a", temperature=0))
    assert first.text in {"wire.", "character"}


def test_the_likeliest_word_follows_where_the_temperature_is_zero(model: NgramModel) -> None:
    texts = {text_of(alone(model, NgramRequest("", seed, 0.0, 30))) for seed in range(10)}
    assert len(texts) == 1


@pytest.mark.parametrize("max_tokens", [1, 7])
def test_the_limit_of_tokens_ends_it_in_length(model: NgramModel, max_tokens: int) -> None:
    tokens = alone(model, NgramRequest("", 3, 0.0, max_tokens))
    assert [token.finish_reason for token in tokens] == [None] * (max_tokens - 1) + ["length"]
    assert len(text_of(tokens).split()) == max_tokens


def test_the_same_seed_gives_the_same_text_from_a_model_trained_again(model: NgramModel) -> None:
    request = NgramRequest("", 11)
    assert alone(NgramModel(TEXT), request) == alone(model, request)


async def test_batching_changes_nothing_in_the_text_of_a_request(model: NgramModel) -> None:
    requests = [
        NgramRequest(prompt, seed, temperature, 40)
        for seed in (*range(12), -1, 2**64 - 1)
        for prompt in ("Hi", "The reader")
        for temperature in (0.0, 0.8, 2.0)
    ]

    async def ask(request: NgramRequest) -> list[Token]:
        return [token async for token in batcher.generate(request)]

    async with Batcher(model, max_batch_size=16, max_batch_wait_ms=0) as batcher:
        together = await asyncio.gather(*map(ask, requests))
    assert together == [alone(model, request) for request in requests]


def test_one_step_advances_all_of_its_states_by_a_word(model: NgramModel) -> None:
    states = [model.start(NgramRequest("", seed)) for seed in range(16)]
    assert [len(token.text.split()) for token in model.step(states)] == [1] * 16
    assert [state.position for state in states] == [1] * 16


def body(**changes: Any) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "What is it"},
    ]
    return {"model": "pyserve-ngram", "messages": messages, **changes}


def test_a_chat_request_asks_with_its_last_message_and_its_parameters() -> None:
    asked = NgramRequest.from_chat(body(seed=5, temperature=0, max_tokens=9))
    assert asked == NgramRequest("What is it", 5, 0, 9)
    assert asked.prompt_tokens == 3
    assert NgramRequest.from_chat(body(max_completion_tokens=4)).max_tokens == 4
    parts = [{"role": "user", "content": [{"type": "text", "text": "in"}, {"text": "parts"}]}]
    assert NgramRequest.from_chat(body(messages=parts)).prompt == "in parts"


def test_without_a_seed_another_prompt_is_another_seed_and_the_same_prompt_the_same() -> None:
    seeds = [
        NgramRequest.from_chat(body(messages=[{"content": prompt}])).seed
        for prompt in ("a", "b", "a")
    ]
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": True},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"seed": 2**64},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"content": None}]},
    ],
)
def test_a_parameter_that_makes_no_sense_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=next(iter(wrong))) as raised:
        NgramRequest.from_chat(body(**wrong))
    assert raised.value.reason == "invalid_parameter"


def test_without_numpy_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "from pyserve.errors import MissingExtraError\n"
        "try: import pyserve.producers.ngram\n"
        "except MissingExtraError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert b"pip install 'pyserve[batch]'" in run.stdout


@pytest.fixture
async def demo_url(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setattr(demo, "WORDS_PER_SECOND", 1e6)  # nobody is reading
    async with demo.demo_server() as url:
        yield url


async def ask_demo(url: str, asked: dict[str, Any]) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=asked) as answer,
    ):
        return answer.status, await answer.read()


async def test_the_demo_streams_the_models_words_as_chunks_with_their_usage(
    demo_url: str, model: NgramModel
) -> None:
    asked = body(stream=True, seed=2, max_tokens=6, stream_options={"include_usage": True})
    _, stream = await ask_demo(demo_url, asked)
    *events, done, rest = stream.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")

    *chunks, last, usage = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    expected = alone(model, NgramRequest.from_chat(asked))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        *({"content": token.text} for token in expected if token.text),
    ]
    assert last["choices"][0]["finish_reason"] == expected[-1].finish_reason
    assert {chunk["model"] for chunk in (*chunks, last, usage)} == {"pyserve-ngram"}
    words = len(deltas) - 1
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": words,
        "total_tokens": 3 + words,
    }


async def test_the_demo_answers_whole_with_the_same_words_as_in_a_stream(
    demo_url: str, model: NgramModel
) -> None:
    _, raw = await ask_demo(demo_url, body(seed=2))
    answer = orjson.loads(raw)
    expected = alone(model, NgramRequest.from_chat(body(seed=2)))
    assert answer["choices"][0]["message"]["content"] == text_of(expected)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(text_of(expected).split())


async def test_the_demo_gives_the_tour_to_who_names_no_model_streamed_or_whole(
    demo_url: str,
) -> None:
    asked = body(model="whatever")
    _, whole = await ask_demo(demo_url, asked)
    assert orjson.loads(whole)["choices"][0]["message"]["content"] == TOUR

    _, stream = await ask_demo(demo_url, {**asked, "stream": True})
    chunks = [orjson.loads(event[6:]) for event in stream.split(b"\n\n")[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == TOUR
    assert {chunk["model"] for chunk in chunks} == {"pyserve-demo"}


async def test_the_demo_lists_the_tour_first(demo_url: str) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{demo_url}/v1/models") as answer:
        listed = await answer.json()
    assert [model["id"] for model in listed["data"]] == ["pyserve-demo", "pyserve-ngram"]


async def test_without_numpy_the_demo_is_the_tour_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    async with demo.demo_server() as url:
        async with aiohttp.ClientSession() as http, http.get(f"{url}/v1/models") as answer:
            listed = await answer.json()
        _, raw = await ask_demo(url, body())
    assert [model["id"] for model in listed["data"]] == ["pyserve-demo"]
    assert orjson.loads(raw)["model"] == "pyserve-demo"


async def test_the_demo_ends_in_the_middle_of_an_answer_and_leaves_no_thread() -> None:
    async with aiohttp.ClientSession() as http:
        async with demo.demo_server() as url:
            answer = await http.post(f"{url}/v1/chat/completions", json=body(stream=True))
            await answer.content.readany()
            assert "pyserve batch" in [thread.name for thread in threading.enumerate()]
        assert "pyserve batch" not in [thread.name for thread in threading.enumerate()]
        answer.close()


async def test_the_demo_refuses_what_makes_no_sense_in_pyserves_shape(demo_url: str) -> None:
    status, raw = await ask_demo(demo_url, body(temperature="hot"))
    assert (status, orjson.loads(raw)["error"]["reason"]) == (400, "invalid_parameter")


async def test_a_model_that_fails_in_mid_answer_is_an_error_within_the_stream(
    demo_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_model: NgramModel, _states: Sequence[NgramState]) -> list[Token]:
        raise ValueError("out of dice")

    monkeypatch.setattr(NgramModel, "step", fail)
    status, stream = await ask_demo(demo_url, body(stream=True))
    assert status == 200
    assert b'"reason":"generation_failed"' in stream.split(b"\n\n")[-2]
    assert b"[DONE]" not in stream
    assert b"out of dice" not in stream
    assert "out of dice" in caplog.text
