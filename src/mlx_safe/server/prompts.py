"""From a request to the tokens that it begins with, and the memory that they need.

What mlx-lm's ``_tokenize`` does, and what is checked, cut and asked around it. Used by
the generation thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from jinja2.exceptions import TemplateError

from .headroom import Headroom
from .in_flight import InFlight, request_of
from .logs import fields
from .metrics import Metrics
from .mlx_lm import compat
from .mlx_lm.protocols.opaque import (
    Json,
    Tokenized,
)
from .mlx_lm.protocols.requests import CompletionRequest, GenerationArguments
from .mlx_lm.protocols.text import Tokenizer
from .model_limits import prompt_field
from .overflow import Overflow, Truncation
from .recovery import one_line
from .replay import Resumed
from .replies import EXPECTED, BadRequest, is_of_all
from .request import Disconnected
from .scheduler import Scheduler
from .served_model import ServedModel

__all__ = ["Held", "Prompts"]

log = logging.getLogger("mlx_safe.server")

# mlx-lm's ``_tokenize``, of one tokenizer and arguments.
Tokenize = Callable[[CompletionRequest], Tokenized]
# Keys of ``chat_template_kwargs`` that are left out one by one to find a wrong one.
KEYS_TRIED = 4


class Held(Exception):
    """The request waits for memory; it will be tokenized again."""


class Prompts:
    """The prompts of one server.

    Args:
        one_rank: False: no rank may find by itself that a client has left.
    """

    def __init__(
        self,
        model: ServedModel,
        overflow: Overflow,
        scheduler: Scheduler[InFlight],
        headroom: Headroom,
        resumed: Resumed,
        metrics: Metrics,
        one_rank: bool,
    ) -> None:
        self._model = model
        self._overflow = overflow
        self._scheduler = scheduler
        self._headroom = headroom
        self._resumed = resumed
        self._metrics = metrics
        self._one_rank = one_rank

    def read(
        self,
        work: CompletionRequest,
        args: GenerationArguments,
        tokenizer: Tokenizer,
        tokenize: Tokenize,
    ) -> Tokenized:
        """What mlx-lm's ``_tokenize`` is to return for ``work``, its request.

        Args:
            args: of ``work``; how many tokens may be generated is changed in it.
            tokenize: mlx-lm's own.

        Raises:
            Exception: the request is not to run now, or at all; see `_admit`.
        """
        found, cut = self._read_and_cut(work, args, tokenizer, tokenize)
        request = request_of(work)
        request.tokenizer = tokenizer
        if cut is not None:
            self._note_cut(cut, request)
        found = self._resumed.prompt(found, request, args, self._model.has_draft)
        self._admit(request, compat.cache_keys(found), args.max_tokens)
        return found

    def _read_and_cut(
        self,
        work: CompletionRequest,
        args: GenerationArguments,
        tokenizer: Tokenizer,
        tokenize: Tokenize,
    ) -> tuple[Tokenized, Truncation | None]:
        limits = self._model.limits
        # Once more: another model may have been asked for when it came.
        limits.check(args)
        limit = self._overflow.refuses_over(limits.context)
        limits.check_length(work, limit)
        encode = tokenizer.encode
        try:
            limits.count(work, limit, encode)
            found, cut = self._overflow.fit(work, tokenize, encode, limits.context)
        except EXPECTED:
            raise
        except Exception as e:
            if is_of_all(e):
                raise  # not the prompt's own
            raise _unreadable(e, work, _at_fault(work, args, tokenize)) from e
        made = len(request_of(work).produced)
        args.max_tokens = limits.answer_tokens(len(found[0]), args.max_tokens, made)
        if not found[0]:
            raise BadRequest("The prompt is empty.", prompt_field(work))
        limits.facts.check_prompt(found[0], args.logits, prompt_field(work))
        return found, cut

    def _admit(self, request: InFlight, keys: list[int], max_tokens: int) -> None:
        """Has the scheduler let ``request`` run, or raises.

        Raises:
            Held: it waits; the scheduler gives it out again.
            NotEnoughMemory: it has waited long enough.
            ContextTooLong: it can never run.
            Disconnected: nobody waits for it any more.
        """
        if self._one_rank and request.is_ended:
            raise Disconnected("the client left before the request was begun")
        request.prompt_key = key = (self._model.key, keys)
        prompt, total = len(keys), len(keys) + max_tokens
        reusable = self._headroom.reusable(*key)
        found = self._scheduler.ask(request, prompt, total, reusable)
        if found.verdict == "wait":
            raise Held
        if found.verdict != "admit":
            raise self._headroom.refusal(found, prompt, total)
        self._headroom.make_room(found, *key)

    def _note_cut(self, cut: Truncation, request: InFlight) -> None:
        if "X-Prompt-Truncated" not in request.headers:  # it may be tokenized again
            log.info(
                "a prompt was %s (--max-prompt-tokens)",
                cut,
                extra=fields(id=request.id),
            )
            self._metrics.truncations.inc()
            request.headers["X-Prompt-Truncated"] = str(cut)


def _at_fault(
    work: CompletionRequest,
    args: GenerationArguments,
    tokenize: Tokenize,
) -> str:
    """The field without which a prompt that cannot be read can be; else the prompt's.

    Each try reads the whole prompt, so there are few.
    """
    if work.request_type != "chat":
        return prompt_field(work)
    kwargs, tools = args.chat_template_kwargs or {}, work.tools
    tries: list[tuple[str, Json, list[Json] | None]] = [
        (f"chat_template_kwargs.{name}", _without(kwargs, name), tools)
        for name in list(kwargs)[:KEYS_TRIED]
    ]
    if len(kwargs) > 1:
        tries.append(("chat_template_kwargs", {}, tools))
    if tools:
        tries.append(("tools", kwargs, None))
    for field, args.chat_template_kwargs, tools in tries:
        copy = request_of(work).as_it_came()
        copy.tools = tools
        try:
            tokenize(copy)
        except Exception as e:
            log.debug(
                "the prompt cannot be read without %s (%s)", field, type(e).__name__
            )
        else:
            return field
        finally:
            args.chat_template_kwargs = kwargs or None
    return prompt_field(work)


def _without(values: Json, name: str) -> Json:
    return {key: value for key, value in values.items() if key != name}


def _unreadable(exc: Exception, work: CompletionRequest, field: str) -> BadRequest:
    """What a client gets for ``exc``, with which mlx-lm failed to read a prompt."""
    what = "the messages" if field == prompt_field(work) else field
    if type(exc) is TemplateError:  # the template's own words: `raise_exception`
        why = f"The model's chat template refuses {what}: {one_line(exc)}"
    elif field != prompt_field(work):
        log.warning(
            "a prompt cannot be read (%s)",
            type(exc).__name__,
            extra=fields(id=request_of(work).id),
        )
        why = f"The model's chat template cannot use {what}."
    else:
        log.warning(
            "a prompt cannot be read (%s)",
            type(exc).__name__,
            extra=fields(id=request_of(work).id),
        )
        why = "The model's tokenizer and chat template cannot make a prompt of this."
    return BadRequest(why, field)
