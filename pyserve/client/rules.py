"""Loss or end: which failures another try may mend.

``tests/client_rules.json`` lists the rules row by row; `pyserve.js` follows the same.
"""

from __future__ import annotations

from typing import Literal

from pyserve.client.errors import AnswerError, ClientError, UnreachableError, is_passing_status

#: What was asked for: the first connection to a stream (or anything that may be asked twice), one
#: after the stream was attached already, the POST that starts a generation.
When = Literal["attach", "reattach", "submit"]


def is_passing(error: ClientError, when: When) -> bool:
    """Whether to try again."""
    if isinstance(error, UnreachableError):
        return not error.first_contact
    if not isinstance(error, AnswerError):
        return when == "reattach"  # there is a pyserve: this is something that stands in between
    if when == "submit":  # it was answered, so that only the server can say that it may be repeated
        return error.status in (429, 503) and error.retry_after_s is not None
    if is_passing_status(error.status):
        return True
    return when == "reattach" and not error.reason  # pyserve always gives one
