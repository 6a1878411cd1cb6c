"""Prompts over ``--max-prompt-tokens``: refused, or cut so that they still read.

A chat is cut by whole messages and rendered again by mlx-lm, so that the template's
shape is the model's own; a text prompt is cut by tokens.
"""

from __future__ import annotations

import bisect
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._command import CommandError
from .mlx_lm.protocols.opaque import (
    Json,
    Tokenized,
)
from .mlx_lm.protocols.requests import CompletionRequest
from .model_limits import too_long

__all__ = ["Overflow", "Truncation", "shortenings"]

log = logging.getLogger("mlx_safe.server")

Message = Json
# mlx-lm's ``_tokenize``: the prompt, a list of tokens, comes first.
Read = Callable[[CompletionRequest], Tokenized]

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function")
BEGINNERS = ("user", "assistant")  # of a turn, and of a step in it


@dataclass(frozen=True)
class Truncation:
    """What was done to a prompt: its tokens before and after."""

    before: int
    after: int
    messages_left_out: int

    def __str__(self) -> str:
        what = f"cut from {self.before} to {self.after} tokens"
        if not self.messages_left_out:
            return what
        return f"{what}, {self.messages_left_out} messages left out"


class Overflow:
    """The limit of a prompt's length, and what happens beyond it.

    Args:
        max_tokens: tokens of a prompt at most; None: no limit.
        policy: ``"error"`` or ``"truncate"``.
        keep_tokens: how many tokens of the beginning stay when a text prompt is
            cut; what the tokenizer puts before every text does in any case. Of a
            chat: after the system prompt also as many of the oldest messages as have
            their place in so many tokens, if the others can make room.

    Raises:
        CommandError: they do not go together; one line that says why.
    """

    def __init__(
        self, max_tokens: int | None, policy: str = "error", keep_tokens: int = 0
    ) -> None:
        if max_tokens is None and (policy != "error" or keep_tokens):
            raise CommandError(
                "--prompt-overflow-policy truncate and --prompt-keep-tokens need "
                "--max-prompt-tokens"
            )
        if keep_tokens and policy != "truncate":
            raise CommandError(
                "--prompt-keep-tokens needs --prompt-overflow-policy truncate"
            )
        if max_tokens is not None and keep_tokens >= max_tokens:
            raise CommandError(
                f"--prompt-keep-tokens {keep_tokens}: must be less than "
                f"--max-prompt-tokens {max_tokens}"
            )
        self._max_tokens = max_tokens
        self._truncates = policy == "truncate"
        self._keep_tokens = keep_tokens

    def limit(self, context: int | None) -> int | None:
        """Tokens of a prompt at most. The flag holds also where it is larger.

        Args:
            context: tokens that the model was made for; None: not known.
        """
        return context if self._max_tokens is None else self._max_tokens

    def compare(self, context: int | None) -> None:
        """Warns of a flag that lets more in than the model was made for."""
        if context is not None and (self._max_tokens or 0) > context:
            log.warning(
                "--max-prompt-tokens %d is more than the %d tokens that the model was "
                "made for; answers get worse beyond them",
                self._max_tokens,
                context,
            )

    def refuses_over(self, context: int | None) -> int | None:
        """The same, of prompts that are refused and not cut; None: any may be."""
        return None if self._truncates else self.limit(context)

    def fit(
        self,
        request: CompletionRequest,
        read: Read,
        encode: Callable[[str], Sequence[int]],
        context: int | None = None,
    ) -> tuple[Tokenized, Truncation | None]:
        """What ``read`` makes of ``request``, cut if need be, and how it was cut.

        Args:
            request: mlx-lm's ``CompletionRequest``.
            read: mlx-lm's ``_tokenize``: the prompt, a list of tokens, comes first
                in what it returns, then its segments. It changes the messages.
            encode: the tokens of a text, as ``read`` makes them.
            context: tokens that the model was made for; None: not known.

        Raises:
            ContextTooLong: the prompt is too long and may not, or cannot, be cut.
        """
        limit = self.limit(context)
        if limit is None:
            return read(request), None
        whole = copy.copy(request)
        if self._truncates:
            whole.messages = copy.deepcopy(request.messages)
        found = read(request)
        tokens = len(found[0])
        if tokens <= limit:
            return found, None
        if not self._truncates:
            raise too_long(tokens, limit, request)
        if request.request_type != "chat":
            prompt = self._cut_tokens(found[0], encode(""))
            return (prompt, [prompt], *found[2:]), Truncation(tokens, len(prompt), 0)
        return self._cut_messages(whole, tokens, read)

    def _cut_tokens(self, prompt: list[int], empty: Sequence[int]) -> list[int]:
        """``empty``: the tokens of an empty text.

        They begin with those that models were trained to see before every text (the
        beginning of a sequence), without which answers get worse.
        """
        assert self._max_tokens is not None
        alike = [a == b for a, b in zip(prompt, empty, strict=False)]
        special = [*alike, False].index(False)
        keep = min(max(special, self._keep_tokens), self._max_tokens - 1)
        return [*prompt[:keep], *prompt[-(self._max_tokens - keep) :]]

    def _cut_messages(
        self,
        whole: CompletionRequest,
        tokens: int,
        read: Read,
    ) -> tuple[Tokenized, Truncation]:
        assert self._max_tokens is not None
        messages = whole.messages
        read_so_far: dict[tuple[int, ...], Tokenized] = {}

        def length(kept: Sequence[int]) -> int:
            shorter = copy.copy(whole)
            shorter.messages = copy.deepcopy([messages[i] for i in kept])
            read_so_far[tuple(kept)] = found = read(shorter)
            return len(found[0])

        system = _system_prompt(messages)
        head = self._head(messages, system, length)
        for stays, limit in (
            (head, self._steady(tokens)),
            (head, self._max_tokens),
            (system, self._max_tokens),
        ):
            choices = shortenings(messages, stays)
            first = _first_within(limit, choices, length)
            if first < len(choices):
                kept = choices[first]
                found = read_so_far[tuple(kept)]
                return found, Truncation(
                    tokens, len(found[0]), len(messages) - len(kept)
                )
        # Even the system prompt and the last message alone.
        raise too_long(tokens, self._max_tokens, whole)

    def _steady(self, tokens: int) -> int:
        """The length to cut to: what goes, goes in eighths of the limit.

        Or a chat at its limit would begin elsewhere in each request, and the
        prompt cache would never have what comes after the system prompt.
        """
        assert self._max_tokens is not None
        part = max(1, self._max_tokens // 8)
        return tokens - -(-(tokens - self._max_tokens) // part) * part

    def _head(
        self,
        messages: list[Message],
        system: int,
        length: Callable[[Sequence[int]], int],
    ) -> int:
        """How many messages at the beginning stay, if the rest can make room."""
        ends = [end for end in _cuts(messages) if end > system]
        if not self._keep_tokens:
            return system
        over = bisect.bisect_left(
            ends, True, key=lambda end: length(range(end)) > self._keep_tokens
        )
        return ends[over - 1] if over else system


def _first_within(
    limit: int, choices: list[list[int]], length: Callable[[Sequence[int]], int]
) -> int:
    """Index of the first choice of at most ``limit`` tokens; they get shorter."""
    return bisect.bisect_left(choices, True, key=lambda kept: length(kept) <= limit)


def shortenings(messages: list[Message], head: int) -> list[list[int]]:
    """The ways to leave messages out, by the indices that stay, longest first.

    The first ``head`` messages, the last one of the user and everything after the
    cut stay, in their order. The oldest turns go first, each as a whole: a message
    of the user and all that follows up to the next one. When only the last turn is
    left, its steps go, oldest first: an answer and the results of its tool calls.
    A call of tools never goes or stays without its results.
    """
    last_user = max(
        (i for i, m in enumerate(messages) if m.get("role") == "user" and i >= head),
        default=None,
    )
    ways = []
    for start in _cuts(messages):
        if start <= head:
            continue
        in_last_turn = last_user is None or start > last_user
        if messages[start].get("role") == "user" or in_last_turn:
            anchor = [last_user] if last_user is not None and in_last_turn else []
            way = [*range(head), *anchor, *range(start, len(messages))]
            if len(way) < len(messages):
                ways.append(way)
    return ways


def _system_prompt(messages: list[Message]) -> int:
    """How many messages it is, as mlx-lm counts them: those at the beginning."""
    roles = [m.get("role") for m in messages]
    return next((i for i, r in enumerate(roles) if r not in SYSTEM_ROLES), len(roles))


def _cuts(messages: list[Message]) -> list[int]:
    """Where a turn or a step begins, and no tool call waits for its result."""
    answer = -1
    calls: dict[object, int] = {}
    waiting: list[int] = []  # one for each call without a result
    crossed = set()
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "assistant":
            answer = i
            for call in message.get("tool_calls") or ():
                calls[call.get("id")] = i
                waiting.append(i)
        elif role in TOOL_ROLES:
            # Not every client sends the id.
            caller = calls.get(message.get("tool_call_id"))
            if caller is None:
                caller = waiting[0] if waiting else answer
            if caller in waiting:
                waiting.remove(caller)
            crossed |= set(range(caller + 1, i + 1))
    begins = [i for i, m in enumerate(messages) if m.get("role") in BEGINNERS]
    return [i for i in begins if i not in crossed]
