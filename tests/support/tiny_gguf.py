"""A real llama.cpp model that weighs about a megabyte and says nothing.

``write_tiny_model`` writes a llama-architecture GGUF with random weights. llama.cpp loads it in
well under a second and generates some thousands of tokens a second on one core, so end-to-end
tests run against the real server instead of an imitation of it.

Three things about it are by construction, not by chance:

- It never ends by itself: a generation has exactly ``max_tokens`` tokens.
- Each token is whole UTF-8, so llama.cpp streams one event for each token.
- Its own words come back from the tokenizer as the tokens they were.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

WIDTH = 64
"""Numbers in the vector of one token."""

LAYERS = 2
HEADS = 2
FEED_FORWARD_WIDTH = 4 * WIDTH

SYLLABLES = [consonant + vowel for consonant, vowel in product("bdklmnrstv", "aeo")]

FOREIGN_WORDS = ["naïve", "Straße", "цвет", "日本", "عين", "🦙"]
"""Words of two, three and four bytes a character, so that streams hold more than ASCII."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SPACE = "\u2581"
"""How SentencePiece writes the space before a word."""

Array = npt.NDArray[np.float32]


def write_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    name: str = "tiny",
    context_length: int = 32768,
    initials: str = "",
) -> Path:
    """Write the model to `path` and return `path`.

    The same `seed` gives the same weights. `context_length` is in tokens; llama.cpp reserves
    256 bytes of cache for each when it loads the model. With `initials` it speaks only words that
    begin with one of these letters, so that models can be told apart.
    """
    pieces, types = _vocabulary()
    speakable = np.array(
        [
            kind == gguf.TokenType.NORMAL
            and (not initials or (piece[:1] == SPACE and piece[1:2] in tuple(initials)))
            for piece, kind in zip(pieces, types, strict=True)
        ]
    )

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(context_length)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)  # half the cache: long contexts stay cheap
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))

    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(index) for index in range(len(pieces))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    for tensor, values in _weights(np.random.default_rng(seed), speakable).items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def foreign_tokens() -> list[int]:
    """The tokens of FOREIGN_WORDS, for a ``logit_bias`` that has them spoken often."""
    pieces, _ = _vocabulary()
    return [pieces.index(SPACE + word) for word in FOREIGN_WORDS]


def _vocabulary() -> tuple[list[str], list[gguf.TokenType]]:
    """The pieces in the order of their ids, and what each is.

    The tokenizer builds a word from neighbouring pieces and needs every step on the way to be a
    piece too: ``_`` + ``ba`` is ``_ba``, and that + ``do`` is ``_bado``.
    """
    special = ["<unk>", "<s>", "</s>"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["".join(pair) for pair in product(SYLLABLES, repeat=2)] + FOREIGN_WORDS
    normal = [SPACE, *SYLLABLES, *(SPACE + text for text in SYLLABLES + words)]
    types = (
        [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        + [gguf.TokenType.BYTE] * len(every_byte)
        + [gguf.TokenType.NORMAL] * len(normal)
    )
    return special + every_byte + normal, types


def _weights(rng: np.random.Generator, speakable: npt.NDArray[np.bool_]) -> dict[str, Array]:
    """Every tensor by its GGUF name, each matrix of shape (outputs, inputs).

    `speakable` has one entry for each token of the vocabulary.

    The llama architecture has no bias on its output, so vector element 0 stands in for one: the
    embedding sets it, no layer writes to it, and so it reaches the output positive whatever the
    text is. There it pushes every token down that must not be spoken.
    """

    def random(outputs: int, inputs: int) -> Array:
        return rng.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)

    def into_stream(inputs: int) -> Array:
        matrix = random(WIDTH, inputs)
        matrix[0] = 0
        return matrix

    tokens = len(speakable)
    ones = np.ones(WIDTH, np.float32)
    embedding = rng.normal(0, 1, (tokens, WIDTH)).astype(np.float32)
    embedding[:, 0] = 4
    output = rng.normal(0, 0.25, (tokens, WIDTH)).astype(np.float32)
    output[~speakable] = 0
    output[:, 0] = np.where(speakable, 0, -100)

    weights = {"token_embd.weight": embedding, "output_norm.weight": ones, "output.weight": output}
    for layer in range(LAYERS):
        weights |= {
            f"blk.{layer}.attn_norm.weight": ones,
            f"blk.{layer}.attn_q.weight": random(WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": random(WIDTH // HEADS, WIDTH),
            f"blk.{layer}.attn_v.weight": random(WIDTH // HEADS, WIDTH),
            f"blk.{layer}.attn_output.weight": into_stream(WIDTH),
            f"blk.{layer}.ffn_norm.weight": ones,
            f"blk.{layer}.ffn_gate.weight": random(FEED_FORWARD_WIDTH, WIDTH),
            f"blk.{layer}.ffn_up.weight": random(FEED_FORWARD_WIDTH, WIDTH),
            f"blk.{layer}.ffn_down.weight": into_stream(FEED_FORWARD_WIDTH),
        }
    return weights
