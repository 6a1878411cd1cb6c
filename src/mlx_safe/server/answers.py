"""How an answer is put together, in the thread of its handler.

mlx-lm's own way ends with a 500 at what a model may write, and has no place for
more than one choice or for log-probabilities in a stream. So its handler only says
what is to be generated (`asked.Asked`) and what the frame of an answer looks
like (``generate_response``). What goes into it is decided here: an `Answer` reads its
choices (`choices`) and sends what they have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Protocol

from . import logprobs, tool_calls
from .asked import Asked, wants_logprobs
from .begun import DONE, INTRODUCED, Begun, Said, said
from .choices import Choices, Connected
from .exchange import Exchange
from .logprobs import Entry, Names
from .logs import fields
from .mlx_lm import compat
from .mlx_lm.protocols.opaque import Item, Json
from .mlx_lm.protocols.requests import AnsweredContext, Response
from .stop_words import StopWords

__all__ = ["Answer"]

log = logging.getLogger("mlx_safe.server")

# One, where json.dumps would make one for each token.
_encode = json.JSONEncoder(allow_nan=False).encode


class Connection(Connected, Protocol):
    """The handler of a request, as far as its answer needs it.

    Attributes:
        n: how many choices are asked for. body: the request.
    """

    n: int
    body: Any
    wfile: Any  # `wire` makes it
    stream: bool
    stream_options: Json | None
    object_type: str

    def current_exchange(self) -> Exchange: ...
    def heard(self) -> None:
        """A token has been made that has no text yet."""

    def send_json(self, status: int, value: Json) -> None: ...
    def end_headers(self) -> None: ...
    def _set_stream_headers(self, status_code: int) -> None: ...
    def generate_response(
        self,
        text: str,
        finish_reason: str | None,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        prompt_cache_count: int | None = None,
    ) -> Json: ...
    def completion_usage_response(
        self,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        prompt_cache_count: int | None = None,
    ) -> Json: ...


class Answer:
    """What one request is answered with.

    Args:
        handler: its handler, which is written to.
        asked: what mlx-lm's handler wants to have generated.

    Attributes:
        is_chat: it is a message, and not a bare text.
        wants_logprobs: the client asked for them.
        stop_words: each choice ends before the first of them.
    """

    def __init__(self, handler: Connection, asked: Asked) -> None:
        self._handler = handler
        self._asked = asked
        self._tools = asked.request.tools
        self.stop_words = asked.arguments.stop_words
        # Nobody waits for a call then: models that write one all the same say it.
        self._reads_calls = handler.body.get("tool_choice") != "none"
        if not self._reads_calls:
            asked.request.tools = None
        self._choices = [_Choice(i, self) for i in range(handler.n)]
        self._event = ""  # that of a stream, up to its choices
        self.is_chat = asked.request.request_type == "chat"
        self._is_introduced = handler.n == 1 or not self.is_chat
        self.wants_logprobs = wants_logprobs(asked.arguments)

    def send(self) -> None:
        """Generates it and sends it.

        Raises:
            GenerationEnded: it could not be generated.
            OSError: its client is gone.
        """
        handler = self._handler
        begun = handler.held.begun
        if begun is not None:
            self._resume(begun)
            if begun.is_done:
                return
        choices = Choices(handler, self._asked, handler.n, begun)
        try:
            self._generate(choices)
        finally:
            handler.current_exchange().requests = choices.requests()

    def _generate(self, all_choices: Choices) -> None:
        handler = self._handler
        stream = handler.stream
        with all_choices as choices:
            for index, item in choices:
                choice = self._choices[index]
                events: list[Json] = []
                if hasattr(item, "token"):
                    choice.add(item)
                elif item is None:
                    if stream and choice.has_something:  # of its last token
                        events = [*self._introduced(), choice.take()]
                    choice.end()
                else:
                    self._begin(choice, item)
                if not stream or choice.is_ending:
                    continue
                choice.note(item)
                if choice.has_something or choice.ended:
                    self._send([*events, *self._introduced(), choice.take()])
                else:
                    handler.heard()
            if stream:
                self._end_stream()
            else:
                handler.send_json(200, self._frame([t.take() for t in self._choices]))

    def _resume(self, begun: Begun) -> None:
        """Goes on where ``begun`` ends; its choices do when they have contexts."""
        self._begin_stream()
        self._is_introduced = self._is_introduced or begun.is_introduced
        for i, choice in enumerate(self._choices):
            choice.resume(begun.tokens(i), begun.prompt(i), begun.has_ended(i))
            if begun.is_introduced:
                choice.introduce()

    def read_calls(
        self, text: str, context: AnsweredContext
    ) -> tuple[list[tool_calls.Call], list[str]]:
        """(calls, what is none) of what stood between a model's markers."""
        if not self._reads_calls:
            return [], [text]
        parser = context.tool_parser
        calls: list[tool_calls.Call] = []
        unread = []
        for part in tool_calls.apart(text, parser):
            try:
                calls += tool_calls.read(part, parser, self._tools)
            except tool_calls.Unreadable as e:
                unread.append(part)
                log.warning(
                    "a tool call is sent as text, as %s cannot read it: %s",
                    *(tool_calls.parser_name(parser), e),
                    extra=fields(id=self._handler.request_id),
                )
        return calls, unread

    # -- what is sent -------------------------------------------------------------

    def _begin(self, choice: _Choice, context: AnsweredContext) -> None:
        if self._handler.stream and not any(t.begun for t in self._choices):
            self._begin_stream()
        choice.begin(context)

    def _begin_stream(self) -> None:
        self._handler._set_stream_headers(200)
        self._handler.end_headers()

    def _introduced(self) -> list[Json]:
        """Names the choices of a stream before one of them says anything.

        openai-python's helper (3.57) keeps them in the order of their first deltas,
        and looks them up by index.
        """
        if self._is_introduced:
            return []
        self._is_introduced = True
        self._handler.held.note(INTRODUCED)
        return [choice.introduce() for choice in self._choices]

    def _usage(self) -> tuple[int, int, int]:
        """Tokens of the prompt, of all that was generated, and those in the cache."""
        prompt, cached = self._choices[0].prompt
        completion = sum(choice.tokens for choice in self._choices)
        return prompt, completion, cached

    def _end_stream(self) -> None:
        handler = self._handler
        end = b"data: [DONE]\n\n"
        if (handler.stream_options or {}).get("include_usage"):
            frame = handler.completion_usage_response(*self._usage())
            # mlx-lm (0.31, 0.32) calls it a "chat.completion" in any stream.
            event = _encode(frame | {"object": handler.object_type})
            end = f"data: {event}\n\n".encode() + end
        handler.held.note(DONE)
        handler.wfile.write(end)
        handler.wfile.flush()

    def _frame(self, choices: list[Json]) -> Json:
        """All of an answer, or of an event: the choices last."""
        usage = () if self._handler.stream else self._usage()
        frame = self._handler.generate_response("", None, *usage)
        frame.pop("choices", None)
        return {**frame, "choices": choices}

    def _send(self, choices: list[Json]) -> None:
        """An event for each; in one piece, as what is noted goes with all of them."""
        if not self._event:
            # The same for all events of a stream; each has one choice.
            self._event = f"data: {_encode(self._frame([])).removesuffix(']}')}"
        events = [f"{self._event}{_encode(choice)}]}}\n\n" for choice in choices]
        self._handler.wfile.write("".join(events).encode())


class _Choice:
    """One choice, and what of it has not been sent yet.

    Attributes:
        tokens: how many there were so far.
    """

    def __init__(self, index: int, answer: Answer) -> None:
        self._index = index
        self._answer = answer
        self._context: AnsweredContext | None = None
        self._read: Callable[[Any], list[tuple[str | None, str]]]
        self._names: Names | None = None
        self.tokens = 0
        self.ended = False
        # Its last token has come; its end is next, and both are sent as one piece.
        self.is_ending = False
        self._last: Response | Said | None = None
        # What an earlier server had sent of it, until there is a context to read it.
        self._said: list[Said] = []
        self._prompt: tuple[int, int] | None = None
        self._finish = "stop"
        words = answer.stop_words
        self._stops = StopWords(words) if words else None
        # The state of what it holds back, as mlx-lm names it.
        self._held_in: str | None = "normal"
        # Not sent yet.
        self._text = ""
        self._reasoning = ""
        self._calls: list[tool_calls.Call] = []
        self._entries: list[Entry] = []
        # What the model has written of a call that goes on; None outside of one.
        self._call: str | None = None
        self._ids: set[str] = set()
        self._calls_sent = 0
        self._length_sent = 0
        self._is_first = True

    def resume(
        self, said: list[Said], prompt: tuple[int, int] | None, has_ended: bool
    ) -> None:
        """Its client has ``said`` already; of one that ``has_ended`` no more comes."""
        self._prompt, self.ended = prompt, has_ended
        if has_ended:
            self.tokens = len(said)
        else:
            self._said = said

    @property
    def prompt(self) -> tuple[int, int]:
        """Tokens of its prompt, and those of them that were in the cache."""
        if self._prompt is not None:
            return self._prompt
        return len(self.context.prompt), self.context.prompt_cache_count

    @property
    def begun(self) -> bool:
        """Whether its prompt has been read as tokens."""
        return self._context is not None

    @property
    def context(self) -> AnsweredContext:
        """mlx-lm's, of a choice that has begun."""
        assert self._context is not None
        return self._context

    def begin(self, context: AnsweredContext) -> None:
        """It is generated now."""
        self._context = context
        self._read = compat.text_by_state(context)
        if self._answer.wants_logprobs:
            self._names = Names(context.tokenizer)
        for one in self._said:
            self.add(one)
            if self.has_something:
                self.take()

    def note(self, item: Item) -> None:
        """``item`` has been taken: the next server is to know."""
        held = self._answer._handler.held
        if not held.is_noting:
            return
        for response in (self._last, item):
            if hasattr(response, "token"):
                if self._prompt is None:  # known with the first token
                    held.note([self._index, *self.prompt])
                    self._prompt = self.prompt
                held.note(said(self._index, response, self._names is not None))
        if item is None:
            held.note([self._index])

    def add(self, response: Response | Said) -> None:
        """Takes one token, and the text that it completes, from mlx-lm."""
        self.tokens += 1
        if response.finish_reason is not None:
            self.is_ending, self._last = True, response
        if self._stops is not None and self._stops.found:
            return  # made before the generation thread could end it
        if self._names is not None:
            self._entries.append(
                Entry(response.token, response.logprob, response.top_tokens)
            )
        if response.finish_reason is not None:
            self._finish = response.finish_reason
        for state, text in self._read(response):
            if self._stops is None:
                self._add_text(state, text)
            elif state is not None:
                self._add_text_to_stop(self._stops, state, text)

    def _add_text_to_stop(self, stops: StopWords, state: str, text: str) -> None:
        if state != self._held_in:  # a marker stands between, and none in a stop word
            self._add_text(self._held_in, stops.rest())
            self._held_in = state
        if not stops.found:
            self._add_text(state, stops.take(text))

    def _add_text(self, state: str | None, text: str) -> None:
        if state == "normal" and self._call is None:
            self._text += text
        elif state == "tool":
            self._call = (self._call or "") + text
        elif state is not None:  # 0.31: None at the model's own end
            if self._call is not None:
                self._end_call(closed=True)
            if state == "reasoning":
                self._reasoning += text
            else:
                self._text += text

    def end(self) -> None:
        """There are no more tokens."""
        self.is_ending = False
        if self._stops is not None:
            if self._stops.found:
                self._finish = "stop"
            self._add_text(self._held_in, self._stops.rest())
        if self._call is not None:
            self._end_call(closed=False)
        if self._calls_sent + len(self._calls) and self._finish == "stop":
            self._finish = "tool_calls"
        self.ended = True

    def _end_call(self, closed: bool) -> None:
        text, self._call = self._call or "", None
        calls, unread = self._answer.read_calls(text, self.context)
        self._calls += calls
        tokenizer = self.context.tokenizer
        end = (tokenizer.tool_call_end or "") if closed else ""
        for part in unread:
            self._text += f"{tokenizer.tool_call_start}{part}{end}"

    # -- the forms of the OpenAI API ----------------------------------------------

    @property
    def has_something(self) -> bool:
        """Whether there is something to send before the end."""
        return bool(self._text or self._reasoning or self._calls)

    def introduce(self) -> Json:
        """The delta that says nothing but whose message it is."""
        self._is_first = False
        delta = {"role": "assistant", "content": ""}
        bare = {"index": self._index, "finish_reason": None, "logprobs": None}
        return {**bare, "delta": delta}

    def take(self) -> Json:
        """What there is, as an element of ``choices``; it is sent with that."""
        choice: Json = {
            "index": self._index,
            "finish_reason": self._finish if self.ended else None,
            "logprobs": None if self._names is None else self._logprobs(self._names),
        }
        if not self._answer.is_chat:
            choice["text"] = self._text
        elif self._answer._handler.stream:
            choice["delta"] = self._message()
        else:
            choice["message"] = self._whole_message()
        self._length_sent += len(self._text)
        self._text = self._reasoning = ""
        if self._calls:
            self._calls_sent += len(self._calls)
            self._calls = []
        self._is_first = False
        return choice

    def _message(self) -> Json:
        # In each delta, clients that add up would have "assistantassistant…".
        message: Json = {"role": "assistant"} if self._is_first else {}
        if self._text:
            message["content"] = self._text
        if self._reasoning:
            # mlx-lm's name for it, and that of most other servers and clients.
            message["reasoning"] = message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [
                self._tool_call(i, call)
                for i, call in enumerate(self._calls, self._calls_sent)
            ]
        return message

    def _whole_message(self) -> Json:
        message = self._message()
        for call in message.get("tool_calls", ()):
            del call["index"]
        return {"content": None if self._calls else "", **message}

    def _tool_call(self, index: int, call: tool_calls.Call) -> Json:
        name = call.id
        if not name or name in self._ids:
            name = tool_calls.new_id()
        self._ids.add(name)
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": index, "type": "function", "id": name, "function": function}

    def _logprobs(self, names: Names) -> Json:
        entries, self._entries = self._entries, []
        if self._answer.is_chat:
            return logprobs.of_chat(entries, names)
        return logprobs.of_completion(entries, names, self._length_sent)
