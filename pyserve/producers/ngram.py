"""A small language model that needs no download: word trigrams, trained in a few milliseconds.

It is real in all that a server can see of a model: it reads a prompt, samples one token a step by
a temperature, advances many sequences in one call, and ends in ``stop`` or ``length``. What it says
is another matter. :class:`NgramModel` is a :class:`~pyserve.producers.batch.BatchModel`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyserve.errors import ApiError, MissingExtraError
from pyserve.producers.batch import Token

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError as error:
    raise MissingExtraError("batch", "The n-gram model") from error

# How much the longer context counts for; the rest is left to the shorter one. The last share keeps
# every word possible after every other, so that there is something to say after any prompt.
_TRIGRAM_SHARE = 0.6
_BIGRAM_SHARE = 0.998

# For the division only: at a temperature of 0 the likeliest word is taken, without dice.
_MIN_TEMPERATURE = 0.01
_MAX_TEMPERATURE = 10.0
_DEFAULT_TEMPERATURE = 0.8
_DEFAULT_MAX_TOKENS = 256

# Stands between paragraphs: who samples it has come to the end, who has seen nothing else begins.
# No text has it as a word. Its place in the vocabulary is 0.
_BOUNDARY = ""


@dataclass(frozen=True, slots=True)
class NgramRequest:
    """What is asked of the model. The same request gives the same text, whoever runs beside it."""

    prompt: str
    seed: int = 0
    temperature: float = _DEFAULT_TEMPERATURE
    max_tokens: int = _DEFAULT_MAX_TOKENS

    @property
    def prompt_tokens(self) -> int:
        """For the usage that a client is told."""
        return len(self.prompt.split())

    @classmethod
    def from_chat(cls, body: Mapping[str, Any]) -> NgramRequest:
        """From the body of ``/v1/chat/completions``; the prompt is what was said last.

        Without a seed, the prompt makes one: another question gets another answer.

        Raises:
            ApiError: reason ``invalid_parameter``.
        """
        prompt = _last_text(body.get("messages"))
        temperature = _number(body, "temperature", _DEFAULT_TEMPERATURE, 0, _MAX_TEMPERATURE)
        # OpenAI's newer name and its older one.
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        max_tokens = _integer(body, limit, _DEFAULT_MAX_TOKENS, 1, 2**31)
        seed = _integer(body, "seed", zlib.crc32(prompt.encode()), -(2**63), 2**64 - 1)
        return cls(prompt, seed, temperature, max_tokens)


@dataclass(slots=True)
class NgramState:
    """Where a sequence is. :class:`NgramModel` makes it and moves it."""

    row: int
    last_word: int
    position: int
    seed: int
    temperature: float
    max_tokens: int


class NgramModel:
    """Learns from a text whose paragraphs have an empty line between them.

    The whole model is one table: a row for each context (a pair of words that the text has, or a
    single word), in it the logarithm of how likely each word is to follow.
    """

    def __init__(self, text: str) -> None:
        words = _words(text)
        self._vocabulary = list(dict.fromkeys(words))
        self._id_of = {word: i for i, word in enumerate(self._vocabulary)}
        self._train(np.array([self._id_of[word] for word in words]))

    def _train(self, ids: NDArray[np.int64]) -> None:
        size = len(self._vocabulary)
        first, second, third = ids[:-2], ids[1:-1], ids[2:]
        unigrams = np.bincount(ids, minlength=size) / len(ids)

        counts = np.zeros((size, size))
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
        bigrams = counts / counts.sum(axis=1, keepdims=True)
        bigrams = _BIGRAM_SHARE * bigrams + (1 - _BIGRAM_SHARE) * unigrams

        pairs, pair_of = np.unique(first * size + second, return_inverse=True)
        counts = np.zeros((len(pairs), size))
        np.add.at(counts, (pair_of, third), 1)
        trigrams = counts / counts.sum(axis=1, keepdims=True)
        trigrams = _TRIGRAM_SHARE * trigrams + (1 - _TRIGRAM_SHARE) * bigrams[pairs % size]

        # Rows 0 to size - 1 are the single words, behind them come the pairs. A pair that the text
        # doesn't have backs off to its second word's row.
        probabilities = np.concatenate([bigrams, trigrams])
        # Each row's largest becomes 0, so that no power of it overflows or is all zero.
        probabilities /= probabilities.max(axis=1, keepdims=True)
        self._scores = np.log(probabilities).astype(np.float32)
        self._row_of_pair = np.tile(np.arange(size), (size, 1))
        self._row_of_pair[pairs // size, pairs % size] = size + np.arange(len(pairs))

    def start(self, request: NgramRequest) -> NgramState:
        """Read the prompt: one whose last two words are known is continued, any other is answered
        with a paragraph from its beginning."""
        row = last_word = 0
        ids = [self._id_of.get(word, 0) for word in request.prompt.split()[-2:]]
        if len(ids) == 2 and all(ids):
            row, last_word = int(self._row_of_pair[ids[0], ids[1]]), ids[1]
        return NgramState(
            row=row,
            last_word=last_word,
            position=0,
            seed=request.seed % 2**64,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
        )

    def step(self, states: Sequence[NgramState]) -> list[Token]:
        """The next word of each sequence."""
        rows = np.array([state.row for state in states])
        last_words = np.array([state.last_word for state in states])
        temperatures = np.array([state.temperature for state in states], dtype=np.float32)
        next_words = self._sample(rows, temperatures, _uniforms(states))
        next_rows = self._row_of_pair[last_words, next_words]
        moves = zip(states, next_words.tolist(), next_rows.tolist(), strict=True)
        return [self._move(state, word, row) for state, word, row in moves]

    def _sample(
        self,
        rows: NDArray[np.int64],
        temperatures: NDArray[np.float32],
        uniforms: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        scores = self._scores[rows]
        weights = np.exp(scores / np.maximum(temperatures, _MIN_TEMPERATURE)[:, None])
        cumulated = np.cumsum(weights, axis=1, dtype=np.float64)
        thresholds = uniforms * cumulated[:, -1]
        # argmax finds the first True: the first word whose share of [0, 1) holds the number drawn.
        drawn = (cumulated > thresholds[:, None]).argmax(axis=1)
        chosen: NDArray[np.int64] = np.where(temperatures > 0, drawn, scores.argmax(axis=1))
        return chosen

    def _move(self, state: NgramState, word: int, row: int) -> Token:
        if word == 0:
            return Token("", "stop")
        text = self._vocabulary[word]
        state.position += 1
        state.last_word, state.row = word, row
        finish_reason = "length" if state.position >= state.max_tokens else None
        return Token(text if state.position == 1 else " " + text, finish_reason)


def _words(text: str) -> list[str]:
    """The text's words, with the boundary before, between and after its paragraphs."""
    words = [_BOUNDARY]
    for paragraph in text.split("\n\n"):
        words += [*paragraph.split(), _BOUNDARY]
    return words


def _uniforms(states: Sequence[NgramState]) -> NDArray[np.float64]:
    """A number in [0, 1) for each, from nothing but its seed and position (SplitMix64): it doesn't
    matter who else is in the batch, and there is no generator to keep for each sequence."""
    bits = np.array([state.seed for state in states], dtype=np.uint64)
    positions = np.array([state.position + 1 for state in states], dtype=np.uint64)
    bits += positions * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _last_text(messages: object) -> str:
    """The text of the last message, which may be in parts."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    told = [part.get("text") for part in parts if isinstance(part, dict)]
    texts = [text for text in told if isinstance(text, str)]
    if not texts:
        raise ApiError("invalid_parameter", "messages must end with one whose content is text")
    return " ".join(texts)


def _number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ApiError("invalid_parameter", f"{name} must be a number from {least:g} to {most:g}")
    return value


def _integer(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ApiError("invalid_parameter", f"{name} must be an integer from {least} to {most}")
    return value
