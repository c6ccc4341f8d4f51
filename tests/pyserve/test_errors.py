"""What a client is told: one shape, fixed words, and the status of the contract."""

from __future__ import annotations

import orjson
import pytest

import pyserve
from pyserve import errors
from pyserve.errors import ENDING_REASONS, REASONS, ApiError, PyserveError, error_type
from pyserve.jobs.translator import FINISH_REASONS

# As the contract has them, section by section.
CONTRACT_STATUS = {
    "invalid_offset": 400,
    "offset_lost": 400,
    "offset_ahead": 400,
    "stream_replaced": 409,
    "stream_not_found": 404,
    "job_not_found": 404,
    "session_active": 409,
    "idempotency_mismatch": 422,
    "replaced": 409,
    "cancelled": 400,
    "epoch_mismatch": 412,
    "memory_budget": 503,
    "model_loading": 503,
    "upstream_auth": 502,
    "upstream_unreachable": 502,
    "upstream_invalid": 502,
}

CONTRACT_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "overloaded_error",
    "upstream_error",
    "server_error",
}


@pytest.mark.parametrize(("reason", "status"), CONTRACT_STATUS.items())
def test_a_reason_has_the_status_of_the_contract(reason: str, status: int) -> None:
    assert ApiError(reason).status == status


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_a_word_with_a_status_and_a_message(reason: str) -> None:
    error = ApiError(reason)
    assert reason.replace("_", "").isalpha()
    assert reason.islower()
    assert 400 <= error.status < 600
    assert error.message
    assert error.type in CONTRACT_TYPES


def test_the_messages_that_clients_look_for() -> None:
    assert ApiError("offset_lost").message == "Stream offset lost, please restart"
    assert ApiError("stream_not_found").message == "Stream not found or expired"
    assert "cancelled" in ApiError("cancelled").message


def test_an_ending_that_is_no_error_is_documented_too() -> None:
    stopped = {"cancelled", "replaced", "abandoned", "max_runtime"}
    complete = {"unterminated", "stop", "length", "tool_calls", "content_filter"}
    assert stopped | complete == ENDING_REASONS.keys()
    assert complete - {"unterminated"} == FINISH_REASONS


@pytest.mark.parametrize("status", [*range(400, 430), *range(500, 512)])
def test_every_status_has_a_type_of_the_contract(status: int) -> None:
    assert error_type(status) in CONTRACT_TYPES


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (409, "conflict_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (502, "upstream_error"),
        (503, "overloaded_error"),
    ],
)
def test_the_type_follows_the_status(status: int, expected: str) -> None:
    assert error_type(status) == expected


def test_the_one_shape_with_figures_beside_the_reason() -> None:
    error = ApiError("offset_lost", first_offset=10, end_offset=20, epoch="m3x9k2")
    assert error.to_dict() == {
        "error": {
            "code": 400,
            "type": "invalid_request_error",
            "message": "Stream offset lost, please restart",
            "reason": "offset_lost",
            "first_offset": 10,
            "end_offset": 20,
            "epoch": "m3x9k2",
        }
    }


def test_a_figure_cannot_pose_as_the_code_or_the_type() -> None:
    error = ApiError("offset_lost", code=200, type="none")
    assert error.to_dict()["error"]["code"] == 400
    assert error.to_dict()["error"]["type"] == "invalid_request_error"


def test_an_upstreams_own_status_message_and_pause_are_passed_on() -> None:
    error = ApiError("upstream_error", "no more tokens today", status=429, retry_after_s=7)
    assert (error.status, error.type, error.retry_after_s) == (429, "rate_limit_error", 7)
    assert str(error) == error.message == "no more tokens today"


def test_a_reason_outside_the_list_cannot_be_raised() -> None:
    with pytest.raises(KeyError):
        ApiError("made_up")


def test_an_error_in_an_openai_stream_is_an_unnamed_event() -> None:
    event = ApiError("upstream_lost").to_event("openai")
    head, payload, tail = event[:6], event[6:-2], event[-2:]
    assert (head, tail) == (b"data: ", b"\n\n")
    assert orjson.loads(payload) == ApiError("upstream_lost").to_dict()


def test_an_error_in_an_anthropic_stream_is_a_named_event() -> None:
    name, data, *rest = ApiError("upstream_lost").to_event("anthropic").split(b"\n")
    assert (name, rest) == (b"event: error", [b"", b""])
    told = orjson.loads(data.removeprefix(b"data: "))
    assert told == {"type": "error", **ApiError("upstream_lost").to_dict()}


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
def test_no_message_can_break_out_of_its_line(dialect: errors.Dialect) -> None:
    event = ApiError("upstream_error", "a\n\ndata: b\r\r\x00").to_event(dialect)
    assert event.count(b"\n\n") == 1
    assert event.endswith(b"\n\n")
    assert b"\r" not in event


def test_all_names_of_the_module_are_there() -> None:
    for name in errors.__all__:
        assert hasattr(errors, name)
    for name in pyserve.__all__:
        assert hasattr(pyserve, name)


def test_the_tree() -> None:
    assert issubclass(errors.ConfigError, PyserveError)
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.MissingExtraError, PyserveError)
    assert issubclass(errors.MissingExtraError, ImportError)
    assert issubclass(ApiError, PyserveError)


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'pyserve[llama]'" in str(errors.MissingExtraError("llama", "--model"))
