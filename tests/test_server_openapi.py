"""What the server says of itself is true: requests, answers, and nothing kills it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from mlx_safe.server import endpoints, openapi, schema
from mlx_safe.server.mlx_lm import compat
from mlx_safe.server.replies import BadRequest
from support.bad_requests import CHAT, cases
from support.server import Server

DESCRIBED = json.loads(openapi.document(compat.takes_xtc()))
SCHEMAS = DESCRIBED["components"]["schemas"]
API: Any = schemathesis.openapi.from_dict(DESCRIBED)
OPERATIONS: dict[str, Any] = {
    found.ok().label: found.ok() for found in API.get_all_operations()
}
# Of requests whose checks are those of the schema: what a field may be.
POSTS = {label: x for label, x in OPERATIONS.items() if x.method == "post"}
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
)
# What no description of a field can say.
OF_THE_MODEL = ("context_length_exceeded", "model_not_found")
# A case of a chat takes a tenth of a second to be made.
SHORT = settings(
    max_examples=4 if settings().derandomize else 100,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@cache
def validator(name: str) -> Any:
    """Of one of the description's schemas."""
    return jsonschema_rs.validator_for(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    )


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, "--api-key", "k", headers=KEY).wait_ready() as server:
        yield server
        assert server.process.poll() is None
        assert "Traceback" not in server.log, server.log


KEY = {"Authorization": "Bearer k"}


# -- the description itself ---------------------------------------------------------


def test_it_is_served_and_is_openapi(server: Server) -> None:
    answer = server.get("/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == DESCRIBED
    assert answer.json["openapi"].startswith("3.1.")
    for name, found in SCHEMAS.items():
        jsonschema_rs.meta.validate({**found, "$schema": DIALECT})
        assert validator(name)


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def test_it_needs_the_key(server: Server) -> None:
    server.headers = {}
    try:
        answer = server.get("/openapi.json")
    finally:
        server.headers = KEY
    assert answer.status == 401
    assert validator("Error").is_valid(answer.json)


def test_every_path_is_in_it() -> None:
    paths = {"/v1/models/{model}", *endpoints.GET_ROUTES, *schema.PATHS}
    assert set(DESCRIBED["paths"]) == paths


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_it_says_of_bad_requests_what_the_server_does(path: str) -> None:
    """The table was written by hand, and knows nothing of the description."""
    known = validator(schema.PATHS[path].__name__)
    seen = {True: 0, False: 0}
    for case in cases():
        if case.path != path:
            continue
        try:
            value = json.loads(case.body, parse_constant=_no_json)
        except (ValueError, RecursionError):
            continue
        try:
            schema.read(path, case.body, takes_xtc=compat.takes_xtc())
            taken = True
        except BadRequest as e:
            if is_of_json(str(e)):
                continue
            taken = False
        assert known.is_valid(value) == taken, case.id
        seen[taken] += 1
    assert min(seen.values()) > 20


def _no_json(word: str) -> None:
    raise ValueError(word)


def is_of_json(message: str) -> bool:
    """Whether a refusal is about more than JSON Schema can say."""
    words = ("range of a double", "nested too deeply", "too many values", "surrogate")
    return any(word in message for word in words)


# -- what was found with it ----------------------------------------------------------


@pytest.mark.parametrize("field", ["n", "max_tokens", "seed", "top_k", "top_logprobs"])
def test_a_number_without_a_fraction_is_an_integer(field: str) -> None:
    body = f'{{"prompt": "x", "{field}": 2.0}}'.encode()
    found = schema.read("/v1/completions", body)[field]
    assert found == 2 and type(found) is int
    with pytest.raises(BadRequest, match="must be an integer"):
        schema.read("/v1/completions", body.replace(b"2.0", b"2.5"))


def test_a_large_integer_in_a_free_field_is_a_number() -> None:
    message = {"role": "user", "content": "x", "size": 10**30}
    found = schema.read(CHAT, json.dumps({"messages": [message]}).encode())
    assert found["messages"][0]["size"] == 1e30


@pytest.mark.parametrize("method", ["TRACE", "DELETE"])
def test_another_method_is_not_allowed(server: Server, method: str) -> None:
    url = f"http://127.0.0.1:{server.port}/v1/models"
    answer = requests.request(method, url, headers=KEY, timeout=60)
    assert answer.status_code == 405
    assert "GET" in answer.headers["Allow"]


def test_a_history_without_a_name_is_refused(server: Server) -> None:
    answer = server.get("/status.json?history=")
    assert answer.status == 400
    assert answer.error["param"] == "history"


# -- what is made of it ---------------------------------------------------------------


@pytest.mark.parametrize("label", POSTS)
@SHORT
@given(data=st.data())
def test_what_it_allows_is_taken(label: str, data: st.DataObject) -> None:
    operation = POSTS[label]
    case = data.draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    raw = json.dumps(case.body).encode()
    schema.read(operation.path, raw, takes_xtc=compat.takes_xtc())


@pytest.mark.parametrize("label", POSTS)
@SHORT
@given(data=st.data())
def test_what_it_does_not_is_refused(label: str, data: st.DataObject) -> None:
    operation = POSTS[label]
    case = data.draw(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    raw = as_sent(case.body)
    with pytest.raises(BadRequest) as refused:
        schema.read(operation.path, raw, takes_xtc=compat.takes_xtc())
    assert not str(refused.value).endswith("is not valid.")  # a rule without a sentence


def as_sent(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def kinds() -> list[tuple[str, Any]]:
    """Each operation, with what is wrong too where something can be."""
    found = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
    both = [*POSTS, "GET /status.json"]
    return found + [(label, GenerationMode.NEGATIVE) for label in both]


@pytest.mark.parametrize(("label", "mode"), kinds())
@SHORT
@given(data=st.data())
def test_every_answer_is_as_described(
    server: Server, label: str, mode: GenerationMode, data: st.DataObject
) -> None:
    operation = OPERATIONS[label]
    case = data.draw(operation.as_strategy(generation_mode=mode))
    if operation.method == "post" and isinstance(case.body, dict):
        keep_short(case.body)
    url = f"http://127.0.0.1:{server.port}"
    response = case.call(base_url=url, headers=KEY, timeout=60)
    case.validate_response(response, checks=CHECKS)
    if response.headers["content-type"][0].startswith("text/event-stream"):
        check_stream(response.text, operation.path)
    if mode is GenerationMode.POSITIVE and response.status_code == 400:
        error = response.json()["error"]
        assert is_of_the_model(error), error
    alive = requests.get(f"{url}/health", timeout=60)
    assert alive.status_code == 200


def keep_short(body: dict[str, Any]) -> None:
    """Not many tokens, as long as the fields are what they may be."""
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is None or (isinstance(value, int | float) and value > 3):
            body[name] = 3


def is_of_the_model(error: dict[str, Any]) -> bool:
    """Whether only the model could know that it cannot."""
    known = ("is an image", "no token", "template", "fetched", "prompt is empty")
    message = error["message"]
    return error["code"] in OF_THE_MODEL or any(word in message for word in known)


def check_stream(text: str, path: str) -> None:
    kind = "ChatCompletion" if "chat" in path else "Completion"
    lines = [line for line in text.splitlines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        name = "ErrorEvent" if "error" in event else f"{kind}Chunk"
        validator(name).validate(event)
