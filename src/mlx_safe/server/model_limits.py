"""What a loaded model can be asked for: its tokens, and how many of them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..memory.context import config_of, context_tokens
from .mlx_lm import compat
from .mlx_lm.model_facts import ModelFacts
from .mlx_lm.protocols.models import Model
from .mlx_lm.protocols.requests import CompletionRequest, GenerationArguments
from .mlx_lm.protocols.text import Tokenizer
from .mlx_lm.speculative import no_draft, why_not_draftable
from .replies import ContextTooLong

__all__ = ["ModelLimits", "context_of", "prompt_field", "too_long"]

log = logging.getLogger("mlx_safe.server")

# A tokenizer may make fewer characters of a text before it cuts it: composition in
# NFC makes one of up to three.
SHRINKS = 4
# A text of so many characters is counted in pieces first. Where it is cut there are
# a few tokens more than in the whole.
LONG, PIECE, CUT = 2**18, 2**16, 16


def context_of(model: Model, tokenizer: Tokenizer) -> int | None:
    """Tokens that ``model`` was made for; None: no limit is known."""
    return context_tokens(
        config_of(tokenizer),
        getattr(tokenizer, "model_max_length", None),
        attends=compat.attends(model),
    )


@dataclass(frozen=True)
class ModelLimits:
    """Of one model. Any thread.

    Attributes:
        facts: what it does with token ids.
        context: tokens that the model was made for; None: no limit is known.
        longest: characters that one token can stand for at most; None: not known.
        undraftable: why no draft model can be used; None: one may be.
    """

    facts: ModelFacts = field(default_factory=ModelFacts)
    context: int | None = None
    longest: int | None = None
    undraftable: str | None = None

    @classmethod
    def of(cls, model: Model, tokenizer: Tokenizer, facts: ModelFacts) -> ModelLimits:
        """Of a model that has just been loaded. Generation thread."""
        context = context_of(model, tokenizer)
        try:
            longest = max(map(len, tokenizer.get_vocab()))
        except MemoryError:
            raise
        except Exception as e:  # a tokenizer of the model's own may have no list
            log.debug("cannot read which tokens the model has: %r", e)
            longest = None
        try:
            undraftable = why_not_draftable(model)
        except Exception as e:  # found out when a draft model is loaded
            log.debug("cannot find out what can draft for this model: %r", e)
            undraftable = None
        return cls(facts, context, longest, undraftable)

    def check_draft(self) -> None:
        """Raises `BadRequest` when no draft model can be used with this model."""
        if self.undraftable is not None:
            raise no_draft(self.undraftable)

    def check(self, args: GenerationArguments) -> None:
        """Refuses, or puts right, what ``args`` want of tokens.

        Args:
            args: of the request; ``top_k`` may be changed.

        Raises:
            BadRequest: there is no such token.
        """
        self.facts.check_bias(args.logits.logit_bias)
        size = self.facts.width
        # mlx-lm (0.31, 0.32) fails on one that leaves nothing out.
        if size is not None and args.sampling.top_k >= size:
            args.sampling.top_k = 0

    def check_length(self, request: CompletionRequest, limit: int | None) -> None:
        """Refuses a prompt that must be too long, before its tokens are counted.

        Counting takes sixty times the text in memory (tokenizers 0.23), and its time
        of the thread that generates.

        Args:
            limit: tokens of a prompt at most; None: no limit.

        Raises:
            ContextTooLong: as the caller would find out.
        """
        if limit is None or self.longest is None:
            return
        least = _characters(request) // (self.longest * SHRINKS)
        if least > limit:
            raise too_long(f"at least {least}", limit, request)

    def count(
        self,
        request: CompletionRequest,
        limit: int | None,
        encode: Callable[..., list[int]],
    ) -> None:
        """The same, of the tokens of a long text, counted in pieces up to the limit.

        Args:
            encode: a tokenizer's, which must not be used by another thread now.

        Raises:
            ContextTooLong: as the caller would find out.
        """
        if limit is None or _characters(request) < LONG:
            return
        least = 0
        for text in _texts(request):
            for at in range(0, len(text), PIECE):
                piece = encode(text[at : at + PIECE], add_special_tokens=False)
                least += max(0, len(piece) - CUT)
                if least > limit:
                    raise too_long(f"at least {least}", limit, request)

    def answer_tokens(self, prompt: int, wanted: int, made: int = 0) -> int:
        """Of an answer at most: it ends with the context, as with max_tokens.

        Args:
            wanted: with ``made`` that there are already.
        """
        # A longer prompt is here because a flag lets it in, with its answer.
        if self.context is not None and prompt <= self.context:
            wanted = min(wanted, self.context - prompt - made)
        # Of none mlx-lm's batches make one all the same; its sequential path fails.
        return max(1, wanted)


def too_long(
    tokens: int | str, limit: int, request: CompletionRequest
) -> ContextTooLong:
    """LiteLLM and langchain-openai know the case by these words."""
    return ContextTooLong(
        f"The prompt is too long: {tokens} tokens. This model's maximum context "
        f"length is {limit} tokens.",
        prompt_field(request),
    )


def prompt_field(request: CompletionRequest) -> str:
    """The API's name of the prompt of mlx-lm's ``CompletionRequest``."""
    return "messages" if request.request_type == "chat" else "prompt"


def _characters(request: CompletionRequest) -> int:
    return sum(map(len, _texts(request)))


def _texts(request: CompletionRequest) -> Iterator[str]:
    if request.request_type != "chat":
        yield request.prompt
        return
    for message in request.messages:
        content = message.get("content") or ()
        for part in [content] if isinstance(content, str) else content:
            yield part if isinstance(part, str) else part.get("text") or ""
