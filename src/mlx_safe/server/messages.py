"""The messages of a chat, as they may come and as mlx-lm can render them.

Their schema is the OpenAI API's (chat completions, "messages"), and what mlx-lm's
templates know besides: a message may have more keys, which the template sees.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from . import strict_json
from .replies import BadRequest

__all__ = [
    *("ROLES", "Described", "Fields", "Message", "choice", "readable_arguments"),
    "refused",
]

Json = dict[str, Any]
NULL = {"type": "null"}

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
IMAGE_TYPES = ("image_url", "input_image", "image")
# Whose content may be left out.
SILENT_ROLES = ("assistant", "tool")
# Under this key a template is shown what is no JSON object, as text. It is what the
# Anthropic API's documentation has clients send back for the arguments of a call
# that were cut short ("fine-grained tool streaming", "handling invalid JSON").
UNREADABLE = "INVALID_JSON"


def refused(what: str, param: str | None = None) -> PydanticCustomError:
    """An error whose sentence is the field's name and ``what``.

    Args:
        param: the name of the place, if it is not where the validator stands.
    """
    # As a value: braces in a template are pydantic's.
    return PydanticCustomError("refused", "{what}", {"what": what, "param": param})


def choice(expected: str, **kinds: type) -> Discriminator:
    """Tells apart what stands in one place by its Python type.

    Args:
        expected: what is said of any other. kinds: type by tag; tags begin with
            ``is_``, by which they are known in the place of an error.
    """

    def tag(value: object) -> str | None:
        return next((name for name, kind in kinds.items() if type(value) is kind), None)

    return Discriminator(
        tag,
        custom_error_type="refused",
        custom_error_message=f"must be {expected}",
    )


class Described:
    """Adds to a type's JSON Schema what a function checks, in that function's stead.

    Args:
        keywords: of JSON Schema (2020-12).
    """

    def __init__(self, **keywords: object) -> None:
        self._keywords = keywords

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> Json:
        return {**handler(core_schema), **self._keywords}


class Fields(BaseModel):
    """An object of the request, in which null means absent."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if isinstance(value, dict):
            return cls.completed({k: v for k, v in value.items() if v is not None})
        return value

    @classmethod
    def completed(cls, value: Json) -> Json:
        """``value`` with what an object of this kind stands for when it is not said."""
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> Json:
        found = handler(core_schema)
        cls.describe(handler.resolve_ref_schema(found))
        return found

    @classmethod
    def describe(cls, schema: Json) -> None:
        """Puts into ``schema`` what pydantic does not know of: nulls, completions."""
        completed = set(cls.completed({}))
        required = [n for n in schema.pop("required", ()) if n not in completed]
        if required:
            schema["required"] = required
        schema.pop("title", None)
        schema["description"] = schema["description"].replace("``", "`")
        for name, field in schema.get("properties", {}).items():
            field.pop("title", None)
            if field.get("default", ...) is None:
                del field["default"]
            if name not in required and NULL not in field.get("anyOf", ()):
                default = {k: field.pop(k) for k in ("default",) if k in field}
                schema["properties"][name] = {"anyOf": [field, NULL], **default}


# -- contents ----------------------------------------------------------------------


class TextPart(Fields):
    """A part of a content that is text."""

    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    """What an assistant has said instead of an answer: text, for a template."""

    type: Literal["refusal"]
    refusal: str


def _link(value: str) -> str:
    if not value.startswith(("data:image/", "http://", "https://")):
        raise refused("must have a data:image/…;base64 or http(s) URL")
    return value


Link = Annotated[
    str, AfterValidator(_link), Described(pattern="^(data:image/|https?://)")
]


class ImageUrl(Fields):
    """The API's form of an image: ``data:image/…;base64,…`` or http(s)."""

    url: Link


Url = Annotated[
    Annotated[Link, Tag("is_text")] | Annotated[ImageUrl, Tag("is_object")],
    choice("a string or an object with a url", is_text=str, is_object=dict),
]


class ImagePart(Fields):
    """An image, as mlx-lm 0.32 reads one: the URL is in either field."""

    type: Literal["image_url", "input_image", "image"]
    image_url: Url | None = None
    image: Url | None = None

    @model_validator(mode="after")
    def _has_a_url(self) -> ImagePart:
        if self.image_url is None and self.image is None:
            raise refused("has no image_url")
        return self

    @classmethod
    def describe(cls, schema: Json) -> None:
        """Adds that there is a URL."""
        super().describe(schema)
        schema["anyOf"] = [_has(name) for name in ("image_url", "image")]


def _has(name: str) -> Json:
    """The JSON Schema of an object in which ``name`` is not null."""
    return {"required": [name], "properties": {name: {"not": NULL}}}


def _kind_of_part(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "refusal"):
        return f"is_{kind}"
    return "is_image" if kind in IMAGE_TYPES else None


Part = Annotated[
    Annotated[TextPart, Tag("is_text")]
    | Annotated[RefusalPart, Tag("is_refusal")]
    | Annotated[ImagePart, Tag("is_image")],
    Discriminator(
        _kind_of_part,
        custom_error_type="refused",
        custom_error_message="must be an object with the type text or image_url",
    ),
]
Content = Annotated[
    Annotated[str, Tag("is_text")] | Annotated[list[Part], Tag("is_parts")],
    choice("a string or an array of parts", is_text=str, is_parts=list),
]


# -- calls of tools ------------------------------------------------------------------


def readable_arguments(value: object) -> str:
    """The arguments of a call in the history as the text of a JSON object.

    mlx-lm (0.31 to 0.32) parses the text for the template, and templates go through
    an object. A model may have written anything, or been cut off, and the client
    sends it back with each request: what is no object becomes the text in one.
    """
    text = value if isinstance(value, str) else strict_json.dumps(value)
    if not text.strip():
        return "{}"
    try:
        found = strict_json.parse(text)
        strict_json.check_value(found)
    except BadRequest:
        found = None
    if not isinstance(found, dict):
        found = {UNREADABLE: text}
    return strict_json.dumps(found)


# Whatever it is, the template has an object of it.
Arguments = Annotated[
    str,
    BeforeValidator(readable_arguments),
    WithJsonSchema({"description": "The text of a JSON object, or what was meant so."}),
]


class CalledFunction(Fields):
    """What a call calls; ``arguments`` is the text of a JSON object."""

    name: str = Field(min_length=1)
    arguments: Arguments

    @classmethod
    def completed(cls, value: Json) -> Json:
        """``value`` with what may be left out."""
        return {"arguments": "", **value}


class ToolCall(Fields):
    """A call that an assistant has made, as the client sends it back."""

    id: str | None = None
    type: Literal["function"]
    function: CalledFunction

    @classmethod
    def completed(cls, value: Json) -> Json:
        """``value`` with what may be left out."""
        return {"type": "function", **value}


class Message(Fields):
    """One message of a chat; other keys go to the chat template as they are."""

    role: str
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    # The API's older form of one of them; never set, as `completed` turns it.
    function_call: CalledFunction | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @classmethod
    def completed(cls, value: Json) -> Json:
        """In today's words what the API had others for: ``function_call``."""
        if value.get("tool_calls") == []:
            del value["tool_calls"]
        call = value.pop("function_call", None)
        if call is not None and "tool_calls" not in value:
            value["tool_calls"] = [{"function": call}]
        if value.get("role") == "function":
            value["role"] = "tool"
        return value

    @classmethod
    def describe(cls, schema: Json) -> None:
        """Adds the roles, who may be silent, and the older form of a call."""
        super().describe(schema)
        fields = schema["properties"]
        fields["role"] = {"enum": [*ROLES], "description": "Or a key of role_mapping."}
        silent = {"enum": [*SILENT_ROLES, "function"]}
        schema["anyOf"] = [{"properties": {"role": silent}}, _has("content")]

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role not in SILENT_ROLES:
            raise refused("has no content")
        if isinstance(self.content, list):
            parts = [_text_of(part) for part in self.content]
            # As mlx-lm does for its templates; without one it shows the array itself.
            if all(text is not None for text in parts):
                self.content = "".join(text or "" for text in parts)
        return self


def _text_of(part: TextPart | RefusalPart | ImagePart) -> str | None:
    if isinstance(part, ImagePart):
        return None
    return part.text if isinstance(part, TextPart) else part.refusal
