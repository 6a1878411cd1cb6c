"""What a request may ask for, checked before anything of it reaches mlx-lm.

The fields and their ranges are the OpenAI API's, with what mlx-lm's own server takes
besides. `read` turns the body of a request into the one that mlx-lm is given. That one
is right in every type and has no nulls. Nothing is in it that mlx-lm or MLX would fail
on in the midst of its work. Any thread.
"""

from __future__ import annotations

import logging
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from . import strict_json
from .messages import ROLES, Described, Fields, Json, Message, choice, refused
from .replies import BadRequest

__all__ = ["PATHS", "TOP_LOGPROBS_MAX", "read", "settled", "takes_images"]

log = logging.getLogger("mlx_safe.server")

INT64 = 2**63 - 1
STOPS_MAX = 16
TOP_LOGPROBS_MAX = 20  # as in the OpenAI API
CHOICES_MAX = 8  # each is a request of its own to the generator
# A penalty looks at so many tokens at most; MLX counts them in 32 bits.
CONTEXT_SIZE_MAX = 2**30
# mlx-lm multiplies logits by 1/temperature, in the model's own type: below this half
# precision overflows. vLLM draws the same line.
TEMPERATURE_MIN = 0.01
# mlx-lm (0.31) sums probabilities up and asks which part is over 1 - top_p, with a
# rounding error of that order: nothing at all may be left.
TOP_P_MIN = 0.001
# XTC leaves out all but the last of the tokens over the threshold: there are never
# two over a half.
XTC_THRESHOLD_MAX = 0.5
DRAFTS_MAX = 64


def _whole(value: object) -> object:
    """JSON has one kind of number: 1.0 is an integer (JSON Schema 2020-12, 6.1.1)."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


WHOLE = BeforeValidator(_whole)
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0, le=INT64), WHOLE]


# No control characters (of Unicode's blocks C0 and C1).
NAME = "^[^\\u0000-\\u001f\\u007f-\\u009f]*$"


def _name(value: str) -> str:
    if not re.fullmatch(NAME[1:-1], value):
        raise refused("has characters that are in no name")
    return value


Name = Annotated[
    str,
    Field(min_length=1, max_length=1024),
    AfterValidator(_name),
    Described(pattern=NAME),
]


def _penalty_factor(value: float) -> float:
    if value and not 0.01 <= value <= 100:
        raise refused("must be 0, or from 0.01 to 100")
    return value


PenaltyFactor = Annotated[
    float,
    AfterValidator(_penalty_factor),
    Described(anyOf=[{"const": 0}, {"minimum": 0.01, "maximum": 100}]),
]
Word = Annotated[str, Field(min_length=1, max_length=4096)]
Words = Annotated[list[Word], Field(max_length=STOPS_MAX)]
Stop = Annotated[
    Annotated[Word, Tag("is_word")] | Annotated[Words, Tag("is_words")],
    choice("a string or an array of strings", is_word=str, is_words=list),
    AfterValidator(lambda value: [value] if isinstance(value, str) else value),
]


def _bias(value: dict[str, float]) -> dict[str, float]:
    for token, bias in value.items():
        if not re.fullmatch(TOKEN_ID[1:-1], token):
            raise refused("must have token ids as its keys")
        if not -BIAS_MAX <= bias <= BIAS_MAX:
            raise refused(f"must have values from -{BIAS_MAX} to {BIAS_MAX}")
    return value


# Python's int() takes more: signs, spaces, underscores, other digits.
TOKEN_ID = "^(0|[1-9][0-9]{0,8})$"
BIAS_MAX = 100
Bias = Annotated[
    dict[str, float],
    AfterValidator(_bias),
    Described(
        propertyNames={"pattern": TOKEN_ID},
        additionalProperties={
            "type": "number",
            "minimum": -BIAS_MAX,
            "maximum": BIAS_MAX,
        },
    ),
]


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool = False


class Request(Fields):
    """What both endpoints take. Names, types and ranges; `_settled` does the rest."""

    model: Name | None = None
    adapters: Name | None = None
    draft_model: Name | None = None
    num_draft_tokens: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX), WHOLE] = 1
    max_tokens: Annotated[int, Field(ge=1, le=INT64), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64), WHOLE] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64), WHOLE] | None = None
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    repetition_penalty: PenaltyFactor | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_context_size: Count | None = None
    presence_context_size: Count | None = None
    frequency_context_size: Count | None = None
    logit_bias: Bias | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX), WHOLE] | None = None
    # Of the API, without a meaning here: they change no answer.
    user: str | None = None
    store: bool | None = None
    metadata: Json | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: Json | None = None

    @model_validator(mode="after")
    def _no_other_answer(self) -> Request:
        """Refuses what would give another answer than the one that was asked for."""
        for name, neutral in NOT_SUPPORTED.items():
            value = (self.__pydantic_extra__ or {}).get(name)
            if value is not None and not _is(value, neutral):
                raise refused("is not supported here", name)
        return self

    @classmethod
    def describe(cls, schema: Json) -> None:
        """Adds what is `NOT_SUPPORTED`."""
        super().describe(schema)
        for name, neutral in NOT_SUPPORTED.items():
            schema["properties"].setdefault(name, {"enum": [*neutral, None]})


FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")

WITHOUT_MEANING = (
    *("user", "store", "metadata", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "prediction"),
    *("parallel_tool_calls", "reasoning_effort"),
)


def _is(value: object, neutral: tuple[object, ...]) -> bool:
    """Whether ``value`` is one of ``neutral``, type and all."""
    return any(type(value) is type(n) and value == n for n in neutral)


# What other servers take and would change the answer, with the values that would
# not. What is in neither this table nor a schema is accepted and has no effect.
NOT_SUPPORTED: dict[str, tuple[object, ...]] = {
    # The OpenAI API.
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "verbosity": ("medium",),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    # vLLM, llama.cpp and others.
    **dict.fromkeys(
        (
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice"),
            *("guided_grammar", "grammar", "json_schema", "chat_template"),
            *("documents", "logits_processors", "prompt_logprobs"),
            *("truncate_prompt_tokens", "enable_thinking", "thinking_budget"),
            *("repeat_penalty", "repeat_last_n", "samplers"),
        ),
        (),
    ),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "top_a": (0, 0.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "dynatemp_range": (0, 0.0),
}


# -- chats -----------------------------------------------------------------------


class Parameters(Fields):
    """A JSON schema, as far as mlx-lm's templates and parsers go into it."""

    properties: Json | None = None


class Function(Fields):
    """A function that a model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: Parameters

    @classmethod
    def completed(cls, value: Json) -> Json:
        """``value`` with what may be left out."""
        nothing = {"type": "object", "properties": {}}
        return {**value, "parameters": value.get("parameters", nothing)}


class Tool(Fields):
    """An element of ``tools``."""

    type: Literal["function"]
    function: Function


# Of transformers' `apply_chat_template`: not variables of the template, and some are
# mlx-lm's own to set.
RESERVED = (
    *("conversation", "messages", "tools", "tokenize", "add_generation_prompt"),
    *("chat_template", "continue_final_message", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "tokenizer_kwargs", "self"),
    "return_assistant_tokens_mask",
)


def _template_arguments(value: Json) -> Json:
    for name in RESERVED:
        if name in value:
            raise refused(f"must not have {name}")
    documents = value.get("documents")  # transformers goes through them itself
    if documents is not None and not (
        isinstance(documents, list) and all(isinstance(d, dict) for d in documents)
    ):
        raise refused("must have an array of objects as documents")
    return value


TemplateArguments = Annotated[
    Json,
    AfterValidator(_template_arguments),
    Described(
        properties={
            **dict.fromkeys(RESERVED, False),
            "documents": {"type": ["array", "null"], "items": {"type": "object"}},
        }
    ),
]


class ChatRequest(Request):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    role_mapping: dict[str, str] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    logprobs: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.tools and self.parallel_tool_calls is False:
            raise refused("cannot be false: it is not supported", "parallel_tool_calls")
        roles = (*ROLES, *(self.role_mapping or {}))
        for i, message in enumerate(self.messages):
            if message.role not in roles:
                names = ", ".join(ROLES)
                raise refused(f"must be one of {names}", f"messages[{i}].role")
        return self

    @classmethod
    def describe(cls, schema: Json) -> None:
        """Adds that calls cannot be kept from coming together."""
        super().describe(schema)
        some = {"type": "array", "minItems": 1}
        together = {"tools": some, "parallel_tool_calls": {"const": False}}
        schema["not"] = {"required": [*together], "properties": together}


# -- texts -----------------------------------------------------------------------


# mlx-lm's server answers one prompt.
Prompt = Annotated[
    Annotated[str, Tag("is_text")]
    | Annotated[
        Annotated[list[str], Field(min_length=1, max_length=1)], Tag("is_texts")
    ],
    choice("one string", is_text=str, is_texts=list),
    AfterValidator(lambda value: value if isinstance(value, str) else value[0]),
]


class TextRequest(Request):
    """The body of ``/v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[
        Annotated[bool, Tag("is_bool")]
        | Annotated[int, Tag("is_int"), Field(ge=0, le=TOP_LOGPROBS_MAX)],
        choice("true, false or a number of tokens", is_bool=bool, is_int=int),
        WHOLE,
    ] = False


PATHS: dict[str, type[Request]] = {
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
    "/v1/completions": TextRequest,
}


# -- from a body to a request --------------------------------------------------------


def read(path: str, raw: bytes | bytearray, *, takes_xtc: bool = True) -> Json:
    """The request that ``raw`` is, as mlx-lm's ``do_POST`` is to read it.

    Args:
        path: one of `PATHS`.
        raw: the body, in UTF-8.
        takes_xtc: whether this mlx-lm can do it (`compat.takes_xtc`).

    Raises:
        BadRequest: with one sentence for the client, and the field that is wrong.
    """
    value = strict_json.loads(raw)
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.")
    try:
        request = PATHS[path].model_validate(value)
    except ValidationError as e:
        raise _as_bad_request(e) from None
    extra = set(request.__pydantic_extra__ or {})
    if unknown := extra - set(NOT_SUPPORTED):
        # A sentence is no field's name: it may be what somebody has written.
        names = sorted(filter(FIELD_NAME.fullmatch, unknown))
        others = len(unknown) - len(names[:20])
        log.debug(
            "fields without effect: %s",
            ", ".join([*names[:20], *([f"{others} more"] if others else [])]),
        )
    found = request.model_dump(
        exclude_unset=True, exclude={*extra, *WITHOUT_MEANING}, warnings=False
    )
    if found.get("xtc_probability") and not takes_xtc:
        raise BadRequest(
            "xtc_probability needs mlx-lm 0.32 or later on this server.",
            "xtc_probability",
        )
    _add_effort(found, getattr(request, "reasoning_effort", None))
    _settle(found)
    return found


class _Defaults(Request):
    chat_template_kwargs: TemplateArguments | None = None


def settled(defaults: Json) -> Json:
    """Fields that hold where a request has none, as `read` would leave them.

    Raises:
        BadRequest: a request could not have one of them; ``param`` names it.
    """
    try:
        found = _Defaults.model_validate(defaults).model_dump(exclude_unset=True)
    except ValidationError as e:
        raise _as_bad_request(e) from None
    _settle(found)
    return {"top_p": 1.0, "chat_template_kwargs": {}, **found}


def takes_images(request: Json) -> str | None:
    """The place of the first image of a request that `read` has made; None: none."""
    for i, message in enumerate(request.get("messages", ())):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] != "text":
                return f"messages[{i}].content[{j}]"
    return None


def _as_bad_request(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, about = first["type"], first.get("ctx", {})
    place = [part for part in first["loc"] if not str(part).startswith("is_")]
    place_name = about.get("param") or strict_json.name_of(place)
    if kind == "refused":
        what = first["msg"]
    else:
        what = SENTENCES.get(kind, "is not valid").format_map(about)
    return strict_json.wrong(place_name, what)


# By pydantic's names of what can be wrong.
SENTENCES = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "list_type": "must be an array",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
}


def _add_effort(found: Json, effort: str | None) -> None:
    """``reasoning_effort`` is a variable of the templates that know it (gpt-oss)."""
    if effort is not None:
        arguments = found.get("chat_template_kwargs", {})
        found["chat_template_kwargs"] = {"reasoning_effort": effort, **arguments}


def _settle(found: Json) -> None:
    """Brings values that mlx-lm's samplers cannot take to the nearest that they can."""
    for name in ("stop", "logit_bias", "tools", "chat_template_kwargs"):
        if not found.get(name, True):
            del found[name]
    if "stream_options" in found:
        # mlx-lm (0.31, 0.32) asks for it without a look, after the whole answer.
        found["stream_options"].setdefault("include_usage", False)
    if 0 < found.get("temperature", 0) < TEMPERATURE_MIN:
        found["temperature"] = TEMPERATURE_MIN
    if found.get("top_p", 1) < TOP_P_MIN:  # the likeliest token alone
        found["temperature"] = 0.0
        del found["top_p"]
    if found.get("top_k") == -1:  # as other servers say "all"
        found["top_k"] = 0
    if found.get("xtc_threshold", 0) > XTC_THRESHOLD_MAX:
        del found["xtc_threshold"]
        found["xtc_probability"] = 0.0
    for kind in ("repetition", "presence", "frequency"):
        size = found.get(f"{kind}_context_size")
        if size == 0:  # mlx-lm looks at all tokens then
            found[f"{kind}_penalty"] = 0.0
        elif size is not None:
            found[f"{kind}_context_size"] = min(size, CONTEXT_SIZE_MAX)
    if "num_draft_tokens" in found:
        found["num_draft_tokens"] = min(found["num_draft_tokens"], DRAFTS_MAX)
    if type(found.get("logprobs")) is int:  # of a text, the API's older form
        count = found["logprobs"]
        found["logprobs"] = True
        found["top_logprobs"] = max(count, found.get("top_logprobs", 0))
