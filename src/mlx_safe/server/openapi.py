"""``/openapi.json``: what the server takes and answers, for programs.

Requests are described by what checks them (`schema`, `messages`); only the answers and
the paths are written down here. Knows nothing of mlx-lm. Any thread.

Format: OpenAPI 3.1.1, whose schemas are JSON Schema 2020-12.
"""

from __future__ import annotations

import functools
import json

from pydantic.json_schema import models_json_schema

from .._version import __version__
from . import schema
from .body import DEFAULT_MAX_BYTES
from .messages import NULL, Json
from .status import HISTORIES
from .strict_json import DEPTH_MAX, VALUES_MAX

__all__ = ["PATH", "document"]

PATH = "/openapi.json"
REF = "#/components/schemas/{model}"
TEXT, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NUMBER = {"type": "number"}
COUNT = {"type": "integer", "minimum": 0}

ABOUT = f"""A protected `mlx_lm.server`.

In every object of a request `null` means absent. Fields that are not described have no
effect. A body is UTF-8 and has at most {VALUES_MAX} values. At most {DEPTH_MAX} arrays
and objects stand in each other. Numbers are within the range of a double, and no string
has half of a surrogate pair. Bodies larger than `--max-request-bytes`
({DEFAULT_MAX_BYTES} as a default) are a 413. What only the model knows is a 400 as
well: a prompt without a token or longer than its context, a token id that it does not
have, a chat that its template cannot render, an image that it cannot read.

Each path but /health needs a key where the server was started with one.
"""


@functools.lru_cache(maxsize=2)
def document(takes_xtc: bool = True) -> bytes:
    """The description as JSON, in UTF-8.

    Args:
        takes_xtc: as of `schema.read`.
    """
    found = {
        "openapi": "3.1.1",
        "info": {
            "title": "mlx-safe",
            "version": __version__,
            "description": ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "paths": _paths(),
        "components": {
            "schemas": {**_requests(takes_xtc), **_answers()},
            "responses": _errors(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "The key is the password; any name.",
                },
            },
        },
    }
    return json.dumps(found).encode()


# -- requests --------------------------------------------------------------------


def _requests(takes_xtc: bool) -> Json:
    models = {*schema.PATHS.values()}
    _, found = models_json_schema(
        [(model, "validation") for model in sorted(models, key=_name)],
        ref_template=REF,
    )
    schemas: Json = found["$defs"]
    if not takes_xtc:
        for model in models:
            none = {"enum": [0, None], "description": "Needs mlx-lm 0.32."}
            schemas[_name(model)]["properties"]["xtc_probability"] = none
    return schemas


def _name(model: type) -> str:
    return model.__name__


# -- answers ---------------------------------------------------------------------


def _object(required: Json, **optional: Json) -> Json:
    """An object; it may have more fields than these."""
    return {
        "type": "object",
        "required": [*required],
        "properties": {**required, **optional},
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _or_null(found: Json) -> Json:
    return {"anyOf": [found, NULL]}


def _ref(name: str) -> Json:
    return {"$ref": REF.format(model=name)}


FINISH = {"enum": ["stop", "length", "tool_calls"]}
ERROR = {
    "message": {**TEXT, "description": "One sentence."},
    "type": {
        **TEXT,
        "description": "Such as invalid_request_error, resource_exhausted_error.",
    },
    "param": {**_or_null(TEXT), "description": "The field that is wrong."},
    "code": {**TEXT, "description": "Such as invalid_request, metal_out_of_memory."},
}
ANSWER = {"id": TEXT, "model": TEXT, "created": COUNT}


def _answers() -> Json:
    call = _object(
        {
            "id": TEXT,
            "type": {"const": "function"},
            "function": _object({"name": TEXT, "arguments": TEXT}),
        }
    )
    said = {
        "reasoning": TEXT,
        "reasoning_content": TEXT,
        "tool_calls": _list(call),
    }
    message = _object(
        {"role": {"const": "assistant"}, "content": _or_null(TEXT)}, **said
    )
    logprobs = _or_null({"type": "object"})
    usage = _object(
        {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
        prompt_tokens_details=_object({"cached_tokens": COUNT}),
    )
    ends = {"index": COUNT, "finish_reason": FINISH, "logprobs": logprobs}
    return {
        "Error": _object({"error": _object(ERROR, retry_after=COUNT)}),
        "ChatCompletion": _object(
            {
                **ANSWER,
                "object": {"const": "chat.completion"},
                "choices": _list(_object({**ends, "message": message})),
                "usage": usage,
            }
        ),
        "Completion": _object(
            {
                **ANSWER,
                "object": {"const": "text_completion"},
                "choices": _list(_object({**ends, "text": TEXT})),
                "usage": usage,
            }
        ),
        "ChatCompletionChunk": _chunk(
            "chat.completion.chunk",
            usage,
            delta=_object({}, role=TEXT, content=TEXT, **said),
        ),
        "CompletionChunk": _chunk("text_completion", usage, text=TEXT),
        "ErrorEvent": _object(
            {**ANSWER, "object": {"const": "error"}, "error": _object(ERROR)}
        ),
        "Model": _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT}),
        "ModelList": _object(
            {"object": {"const": "list"}, "data": _list(_ref("Model"))}
        ),
        "Health": _health(),
        "Status": _status(),
    }


def _health() -> Json:
    return _object(
        {
            "status": {"enum": ["ok", "unavailable"]},
            "in_flight": COUNT,
            "waiting": COUNT,
            "waiting_for_memory": COUNT,
            "oldest_waiting_s": NUMBER,
            "step": _or_null(_object({"kind": TEXT, "age_s": NUMBER})),
        },
        state=TEXT,
        reason=TEXT,
    )


def _chunk(kind: str, usage: Json, **content: Json) -> Json:
    choice = {"index": COUNT, "finish_reason": _or_null(FINISH), **content}
    return _object(
        {
            **ANSWER,
            "object": {"const": kind},
            "choices": _list(_object(choice, logprobs=_or_null({"type": "object"}))),
        },
        usage=usage,
    )


def _status() -> Json:
    figures = {"type": "object", "additionalProperties": INTEGER}
    return _object(
        {
            "version": INTEGER,
            "time": NUMBER,
            "server": _object({"state": TEXT, "pid": INTEGER, "mlx_safe": TEXT}),
            "memory": _object(
                {"ceiling": INTEGER, "active": INTEGER, "parts": figures}
            ),
            "requests": _object(
                {"in_flight": COUNT, "waiting": COUNT, "tokens": COUNT}
            ),
            "counts": figures,
            "prompt_cache": figures,
            "disk": _or_null({"type": "object"}),
            "reports": _list({"type": "object"}),
            "marks": _list({"type": "object"}),
        },
        history=_object({"every_s": NUMBER, "fields": _list(TEXT)}),
    )


def _errors() -> Json:
    """The responses that any path may have, by the name they go by in `_fails`."""
    error = {"application/json": {"schema": _ref("Error")}}
    retry = {
        "Retry-After": {
            "description": "Seconds until another try makes sense.",
            "required": True,
            "schema": {**INTEGER, "minimum": 1},
        }
    }
    challenge = {"WWW-Authenticate": {"required": True, "schema": TEXT}}
    allow = {"Allow": {"required": True, "schema": TEXT}}
    errors = {
        "400": ("The request is wrong; `param` names the field.", {}),
        "401": ("There is no key, or it is not right.", challenge),
        "404": ("There is no such path, model, adapter or draft model.", {}),
        "405": ("Another method is allowed here.", allow),
        "408": ("The body came too slowly.", {}),
        "411": ("The length of the body is missing.", {}),
        "413": ("The body is too large.", {}),
        "415": ("A body with a Content-Encoding is not supported.", {}),
        "500": ("The server failed, and another try would as well.", {}),
        "503": ("A fault of the GPU, too little memory, or a restart.", retry),
    }
    return {
        f"Error{status}": {"description": about, "headers": headers, "content": error}
        for status, (about, headers) in errors.items()
    }


# -- paths -----------------------------------------------------------------------


def _fails(*statuses: int) -> Json:
    return {
        str(status): {"$ref": f"#/components/responses/Error{status}"}
        for status in (*statuses, 401, 405)
    }


def _answered(about: str, name: str) -> Json:
    content = {"application/json": {"schema": _ref(name)}}
    return {"description": about, "content": content}


def _get(
    operation: str, summary: str, answer: Json, *fails: int, **more: object
) -> Json:
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "responses": {"200": answer, **_fails(*fails)},
            **more,
        }
    }


def _plain(about: str, content_type: str) -> Json:
    return {"description": about, "content": {content_type: {"schema": TEXT}}}


STREAM = (
    "With `stream` true: server-sent events, each one line `data: ` and {chunk} as "
    "JSON, then `data: [DONE]`. With `stream_options.include_usage` the last chunk has "
    "the `usage` and no choices. A stream that fails after its first token ends with "
    "an ErrorEvent; before it, the answer is the error itself. Lines that begin with a "
    "colon are comments."
)


def _post(operation: str, summary: str, request: str, answer: str) -> Json:
    frames = STREAM.format(chunk=f"a {answer}Chunk")
    ok = _answered(f"The answer. {frames}", answer)
    # Without a schema: OpenAPI 3.1 has one of the whole text, and tools (schemathesis
    # 4.32) take it for one of each event.
    ok["content"]["text/event-stream"] = {}
    body = {
        "required": True,
        "content": {"application/json": {"schema": _ref(request)}},
    }
    fails = _fails(400, 404, 408, 411, 413, 415, 500, 503)
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": body,
            "responses": {"200": ok, **fails},
        }
    }


def _health_path() -> Json:
    """Without a key: load balancers ask it."""
    found = _get(
        "health",
        "Whether requests are served.",
        _answered("Yes.", "Health"),
        security=[{}],
    )
    found["get"]["responses"]["503"] = _answered("No, and why.", "Health")
    del found["get"]["responses"]["401"]
    return found


def _paths() -> Json:
    chat, text = schema.ChatRequest.__name__, schema.TextRequest.__name__
    posts = {
        chat: ("Answers a chat.", chat, "ChatCompletion"),
        text: ("Goes on with a text.", text, "Completion"),
    }
    status: Json = {"security": [{}, {"bearer": []}, {"basic": []}]}
    history = {
        "name": "history",
        "in": "query",
        "schema": {"enum": [*HISTORIES, "none"], "default": "short"},
    }
    model = {"name": "model", "in": "path", "required": True, "schema": TEXT}
    return {
        **{
            path: _post(path.strip("/").replace("/", "_"), *posts[_name(kind)])
            for path, kind in schema.PATHS.items()
        },
        "/v1/models": _get(
            "models", "What requests may name.", _answered("The list.", "ModelList")
        ),
        "/v1/models/{model}": _get(
            "model",
            "One of them; its id may have slashes.",
            _answered("It.", "Model"),
            404,
            parameters=[model],
        ),
        "/health": _health_path(),
        "/metrics": _get(
            "metrics",
            "Figures for Prometheus (docs/metrics.md).",
            _plain("Its text format.", "text/plain"),
        ),
        "/status": _get(
            "status",
            "A page of what goes on; a 404 where --status-page hides it.",
            _plain("The page.", "text/html"),
            404,
            **status,
        ),
        "/status.json": _get(
            "status_json",
            "What feeds the page.",
            _answered("Figures and ids.", "Status"),
            400,
            404,
            parameters=[history],
            **status,
        ),
        PATH: _get(
            "openapi",
            "This description.",
            {
                "description": "OpenAPI 3.1.",
                "content": {"application/json": {"schema": {"type": "object"}}},
            },
        ),
    }
