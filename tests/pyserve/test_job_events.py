"""A job's events: what is made of an upstream's chunks, and where they go."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from jobs import Told, told_in

from pyserve import ApiError, EventTooLargeError, SessionEndedError, StreamSessionManager
from pyserve.jobs.job import Job, JobLog, Output, Text
from pyserve.jobs.request import parse_job_request
from pyserve.jobs.translator import Translator
from pyserve.sessions import Ending, StreamSession


class Case:
    """A job whose upstream the test is."""

    def __init__(self, manager: StreamSessionManager, stream: StreamSession | None = None) -> None:
        self.job = Job("j", "", parse_job_request({"prompt": "p"}), 4096)
        manager.dialects["job"] = lambda _session, ending: self.job.last_event(ending)
        self.log = JobLog("j", stream)
        self.log.session = manager.create_or_replace("c", subkey="1", dialect="job")
        self.translator = Translator(self.job, self.log)

    def feed(self, *chunks: Any) -> None:
        for item in chunks:
            data = item if isinstance(item, bytes) else orjson.dumps(item)
            self.translator.append(b"data: " + data + b"\n\n")

    def told(self, whole: bool = False) -> list[tuple[str, dict[str, Any]]]:
        events = _read(self.log.session)
        named = [(e.name, {k: v for k, v in e.data.items() if k != "job_id"}) for e in events]
        return named if whole else [event for event in named if event[0] != "job_queued"]


def _read(session: StreamSession) -> list[Told]:
    reader = session.read_from("earliest")
    log = b""
    while block := reader.read_ready():
        log += block
    return told_in(log, session.dropped_prefix)


@pytest.fixture
def case(manager: StreamSessionManager) -> Case:
    return Case(manager)


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def call(index: int, arguments: str | None = None, **fields: Any) -> dict[str, Any]:
    function = {name: fields.pop(name) for name in ("name",) if name in fields}
    if arguments is not None:
        function["arguments"] = arguments
    return delta(tool_calls=[{"index": index, "function": function} | fields])


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}


def test_content_and_reasoning_are_tokens_of_their_own(case: Case) -> None:
    case.feed(delta(role="assistant", content=None), delta(reasoning_content="hm"))
    case.feed(delta(reasoning="m"), delta(content="so"), {"choices": [{"text": "!"}]})
    assert case.told() == [
        ("reasoning", {"token": "hm"}),
        ("reasoning", {"token": "m"}),
        ("token", {"token": "so"}),
        ("token", {"token": "!"}),
    ]
    output = case.job.output.describe()
    assert (output["text"], output["reasoning"]) == ("so!", "hmm")
    assert case.job.metrics.tokens == 4


def test_a_tool_call_starts_grows_and_is_whole(case: Case) -> None:
    case.feed(call(0, "", id="t", name="search"), call(0, '{"q":'), call(0, '"x"}'), END)
    named = {"index": 0, "tool_call_id": "t"}
    assert case.told() == [
        ("tool_start", named | {"name": "search"}),
        ("tool_status", named | {"arguments": '{"q":'}),
        ("tool_status", named | {"arguments": '{"q":"x"}'}),
        ("tool_end", named | {"name": "search", "arguments": '{"q":"x"}'}),
    ]
    assert case.job.output.tool_calls == [{"id": "t", "name": "search", "arguments": '{"q":"x"}'}]
    assert case.translator.finish_reason == "tool_calls"


def test_one_call_ends_when_the_next_begins(case: Case) -> None:
    case.feed(call(0, "{}", id="a", name="f"), call(1, "[]", id="b", name="g"), b"[DONE]")
    names = [(name, data["index"]) for name, data in case.told() if name != "tool_status"]
    assert names == [("tool_start", 0), ("tool_end", 0), ("tool_start", 1), ("tool_end", 1)]


def test_long_arguments_cost_a_small_multiple_of_their_length(
    manager: StreamSessionManager,
) -> None:
    case = Case(manager)
    size = 0
    emit = case.log.emit

    def count(name: str, /, **fields: Any) -> None:
        nonlocal size
        size += len(fields.get("arguments", ""))
        if name != "tool_end":
            emit(name, **fields)

    case.log.emit = count  # type: ignore[method-assign]
    case.feed(call(0, id="t", name="f"), *[call(0, "xyz") for _ in range(1000)], END)
    assert case.job.output.tool_calls[0]["arguments"] == "xyz" * 1000
    assert size < 12 * 3000 + 256 * 256


def test_a_call_that_breaks_off_has_no_end(case: Case) -> None:
    case.feed(call(0, '{"q"', id="t", name="f"))
    case.log.session.fail(ApiError("upstream_lost"))
    assert [name for name, _ in case.told()] == ["tool_start", "tool_status", "job_error"]
    assert case.job.output.tool_calls == []


def test_usage_is_told_once_at_the_end_as_it_came_last(case: Case) -> None:
    case.feed(delta(content="a") | {"usage": {"n": 1}}, {"choices": [], "usage": {"n": 2}})
    case.feed({"choices": [], "timings": {"ms": 3}}, b"[DONE]")
    case.translator.end_input()
    assert case.told() == [
        ("token", {"token": "a"}),
        ("usage", {"usage": {"n": 2}, "timings": {"ms": 3}}),
    ]
    assert case.job.usage == {"n": 2}


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"choices": None},
        {"choices": [None, 1]},
        {"choices": [{"index": 1, "delta": {"content": "another answer"}}]},
        {"choices": [{"index": 0, "delta": {"content": 5, "tool_calls": 7}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": None}]}}]},
        {"usage": 3, "timings": []},
    ],
)
def test_what_is_odd_in_a_chunk_is_left_out(case: Case, odd: dict[str, Any]) -> None:
    case.feed(odd)
    assert case.told() == []


@pytest.mark.parametrize("bad", [b"{", b"[]", b"null", b"\xff", b'"x"'])
def test_what_is_no_chunk_is_an_invalid_answer(case: Case, bad: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        case.feed(bad)
    assert raised.value.reason == "upstream_invalid"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"message": "no", "code": 400}, "no"),
        ("no", "no"),
        ({"code": 1}, "The upstream answered with an error"),
        ({"message": "x" * 9000}, "x" * 2000),
    ],
)
def test_an_error_in_the_stream_is_the_jobs(case: Case, told: Any, message: str) -> None:
    with pytest.raises(ApiError) as raised:
        case.feed({"error": told})
    assert (raised.value.reason, raised.value.message) == ("upstream_error", message)


@pytest.mark.parametrize("size", range(1, 12))
def test_chunks_may_be_split_anywhere(case: Case, size: int) -> None:
    wire = b"".join(
        b"data: " + orjson.dumps(item) + b"\r\n\r\n" for item in (delta(content="é"), END)
    )
    for at in range(0, len(wire), size):
        case.translator.append(wire[at : at + size])
    assert case.told() == [("token", {"token": "é"})]
    assert case.translator.finish_reason == "tool_calls"


@pytest.mark.parametrize(("rest", "is_told"), [(b"\n", True), (b"", False)])
def test_at_the_end_a_whole_line_counts_and_half_a_line_does_not(
    case: Case, rest: bytes, is_told: bool
) -> None:
    case.translator.append(b"data: " + orjson.dumps(delta(content="a")) + rest)
    case.translator.end_input()
    assert (case.told() != []) == is_told


# --- the log


def test_an_announcement_leaves_the_job_waiting(case: Case) -> None:
    case.log.announce("job_queued", queue_position=3)
    assert case.log.session.state == "queued"
    assert case.told(whole=True) == [("job_queued", {"queue_position": 3})]
    case.log.emit("job_started", model="m")
    assert case.log.session.state == "streaming"


@pytest.mark.parametrize(
    ("end", "name", "reason"),
    [
        (lambda s: s.finalize("completed", "stop"), "job_complete", "stop"),
        (lambda s: s.finalize(), "job_complete", None),
        (lambda s: s.cancel("abandoned"), "job_cancelled", "abandoned"),
        (lambda s: s.fail(ApiError("shutdown")), "job_error", "shutdown"),
        (lambda s: s.manager.fail_live(ApiError("shutdown")), "job_error", "shutdown"),
        (lambda s: s.manager.evict_and_cancel(s.key), "job_cancelled", "cancelled"),
    ],
)
def test_whoever_ends_it_the_job_says_so_once(
    case: Case, end: Any, name: str, reason: str | None
) -> None:
    session = case.log.session
    end(session)
    session.cancel()
    session.fail(ApiError("internal_error"))
    ((told_name, told),) = case.told()
    assert (told_name, told["reason"]) == (name, reason)
    with pytest.raises(SessionEndedError):
        case.log.emit("token", token="late")


def test_an_event_that_is_too_large_ends_the_job_in_its_words(case: Case) -> None:
    with pytest.raises(EventTooLargeError):
        case.feed(delta(content="x" * 5000))
    ((name, told),) = case.told()
    assert (name, told["reason"]) == ("job_error", "event_too_large")


def test_whatever_fits_only_the_jobs_own_log_fails_the_job_and_not_the_stream(
    manager: StreamSessionManager,
) -> None:
    """The stream has come far: its ids are longer, and so is the same event."""
    stream = manager.create_or_replace("s", subkey="stream")
    for _ in range(300):
        stream.append_event("x" * 900)
    outcomes = set()
    for length in range(3950, 4050):
        case = Case(manager, stream)
        case.log.emit("job_started", model="m")
        before = stream.total_size
        try:
            case.log.emit("token", token="y" * length)
        except EventTooLargeError:
            assert case.log.session.state == "failed"
            outcomes.add(("refused", case.log.session.total_size > 4000))
        else:
            assert stream.total_size > before
            outcomes.add(("taken", False))
        assert stream.is_live
    assert outcomes >= {("taken", False), ("refused", True)}


def test_a_stream_that_is_gone_is_no_loss(manager: StreamSessionManager) -> None:
    stream = manager.create_or_replace("s")
    case = Case(manager, stream)
    case.log.emit("token", token="a")
    stream.cancel()
    case.log.emit("token", token="b")
    assert [data["token"] for _, data in case.told()] == ["a", "b"]
    assert [event.data["token"] for event in _read(stream)] == ["a"]


# --- what is kept of it


def test_a_text_keeps_its_newest_part_whole_characters_of_it() -> None:
    text = Text(10)
    for _ in range(7):
        text.add("aé")
    assert (str(text), text.is_truncated) == ("éaéaéaé"[1:], True)


def test_an_output_keeps_what_calls_there_is_room_for() -> None:
    output = Output(100)
    for arguments in ("{}", "x" * 100, "{}"):
        output.add_tool_call({"id": "", "name": "f", "arguments": arguments})
    assert output.describe()["tool_calls"] == [{"id": "", "name": "f", "arguments": "{}"}]
    assert output.describe()["truncated"]


def test_rates_are_measured_between_the_first_token_and_the_last(case: Case) -> None:
    metrics = case.job.metrics
    case.feed(delta(content="a"))
    assert metrics.describe()["tokens_per_second"] is None
    metrics._first_token, metrics._last_token, metrics.tokens = 10.0, 12.0, 9
    assert metrics.describe()["tokens_per_second"] == 4.0


def test_an_error_is_kept_without_what_it_came_from(case: Case) -> None:
    try:
        raise ApiError("upstream_error", "words", status=507, upstream_code=3)
    except ApiError as error:
        case.job.last_event(Ending("failed", error.reason, error))
    kept = case.job.error("upstream_error")
    assert (kept.message, kept.status, kept.figures) == ("words", 507, {"upstream_code": 3})
    assert kept.__traceback__ is None
    # Another ending was first.
    assert case.job.error("shutdown").message == "The server is shutting down"
