"""Log-probabilities of an answer's tokens, in the forms of the OpenAI API.

https://platform.openai.com/docs/api-reference/chat/object ("logprobs"), and for
/v1/completions the older form with four lists.
"""

from __future__ import annotations

import codecs
import math
from typing import Any, NamedTuple

from .mlx_lm import compat
from .mlx_lm.protocols.opaque import Array, Json
from .mlx_lm.protocols.text import Tokenizer

__all__ = [
    *("NOT_READ", "Entry", "Names", "of_chat", "of_completion", "top_logprobs"),
]

# As in the OpenAI API: the log-probability of what cannot come, such as a token that
# a bias forbids (JSON has no infinity).
IMPOSSIBLE = -9999.0


class _NotRead:
    """Stands for log-probabilities that nobody asked for.

    mlx-lm (0.31.3, 0.32.2) reads that of each token when the next step is on its way.
    To pick it is work for the same stream, so reading it waits for that whole step,
    and nothing of the server runs beside the model. With 8 clients it is 8 such waits.
    """

    def __getitem__(self, token: int) -> _NotRead:
        return self

    def item(self) -> float:
        return math.nan


NOT_READ = _NotRead()


def top_logprobs(logprobs: Array, count: int, tokenizer: object) -> tuple[Json, ...]:
    """Stands in for ``mlx_lm.server._format_top_logprobs``; generation thread.

    That (0.31.3, 0.32.2) gives them in no order, and fails with a ``count`` of more
    than there are. Here the most likely come first; those alike by their ids.

    Returns:
        ``{"id", "logprob"}`` of each.
    """
    import mlx.core as mx

    count = min(count, logprobs.size)
    if count <= 0:
        return ()
    found = mx.argpartition(-logprobs, kth=count - 1)[:count]
    ids: Any = found.tolist()
    values: Any = logprobs[found].tolist()
    ranked = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple({"id": token, "logprob": value} for token, value in ranked)


class Names:
    """What the tokens of one tokenizer are called, and the bytes that they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelling = compat.spelling(tokenizer)
        self._added = tokenizer.added_tokens_decoder

    def bytes(self, token: int) -> bytes:
        """What ``token`` adds to a text; UTF-8, perhaps a part of a character."""
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        if spelled is None:  # models have room for more tokens than tokenizers name
            return b""
        if token in self._added:
            return bytes(spelled.encode())
        if self._spelling == "bytes":
            return _from_letters(spelled)
        if self._spelling == "spm":
            if spelled.startswith("<0x") and spelled.endswith(">"):
                return bytes([int(spelled[3:-1], 16)])
            return bytes(spelled.replace("\u2581", " ").encode())
        return bytes(self._tokenizer.decode([token]).encode())


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    found = {chr(byte): byte for byte in plain}
    return found | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _letters()


def _from_letters(spelled: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in spelled)
    except KeyError:
        return spelled.encode()


class Entry(NamedTuple):
    """One token of an answer. ``top``: what might have come, most likely first."""

    token: int
    logprob: float
    top: tuple[Json, ...]


def of_chat(entries: list[Entry], names: Names) -> Json:
    """``logprobs`` of a chat's choice; with the ``id`` of each token, as mlx-lm has."""
    return {
        "content": [
            _named(entry.token, entry.logprob, names)
            | {
                "top_logprobs": [
                    _named(t["id"], t["logprob"], names) for t in entry.top
                ]
            }
            for entry in entries
        ]
    }


def of_completion(entries: list[Entry], names: Names, begins: int) -> Json:
    """``logprobs`` of a completion's choice, and a chat's ``content`` as mlx-lm has.

    Args:
        begins: characters of the text before the first of ``entries``.
    """
    content = of_chat(entries, names)["content"]
    offsets = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for found in content:
        offsets.append(begins)
        begins += len(decoder.decode(bytes(found["bytes"])))
    return {
        "tokens": [found["token"] for found in content],
        "token_logprobs": [found["logprob"] for found in content],
        # As OpenAI's: the token itself is always among them.
        "top_logprobs": [
            {t["token"]: t["logprob"] for t in [*found["top_logprobs"], found]}
            for found in content
        ],
        "text_offset": offsets,
        "content": content,
    }


def _named(token: int, logprob: float, names: Names) -> Json:
    raw = names.bytes(token)
    try:
        name = raw.decode()
    except UnicodeDecodeError:  # a part of a character
        name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {
        "id": token,
        "token": name,
        "logprob": logprob if math.isfinite(logprob) else IMPOSSIBLE,
        "bytes": list(raw),
    }
