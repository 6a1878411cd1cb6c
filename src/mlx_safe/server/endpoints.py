"""The paths that need no generation: health, models and such, and 404 and 405."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote

from . import openapi, schema, status_page
from .access import STATUS
from .metrics import CONTENT_TYPE
from .mlx_lm import compat
from .mlx_lm.protocols.opaque import Json
from .replies import BadRequest, ModelNotFound
from .responses import Responses
from .status import HISTORIES

__all__ = ["Endpoints"]

GET_ROUTES = ("/health", "/metrics", "/v1/models", openapi.PATH, *STATUS)
MODEL_ROUTE = "/v1/models/"


class Endpoints(Responses):
    """Answers every method but POST. Runs on a thread of its own."""

    path = ""  # of a request whose first line cannot be read

    def do_GET(self) -> None:
        """Answers `GET_ROUTES`, and ``/v1/models/ID``."""
        route = self.path.partition("?")[0]
        if route == "/metrics":
            body = self.response_generator.metrics.render()
            self.send_body(200, CONTENT_TYPE, body)
        elif route == "/health":
            self.handle_health_check()
        elif route == "/v1/models":
            self.handle_models_request()
        elif route == openapi.PATH:
            described = openapi.document(compat.takes_xtc())
            self.send_body(200, "application/json", described)
        elif route == "/status":
            self.send_body(200, status_page.CONTENT_TYPE, status_page.body())
        elif route == "/status.json":
            self._send_status()
        elif route.startswith(MODEL_ROUTE):
            self._send_model(unquote(route.removeprefix(MODEL_ROUTE)))
        else:
            self.refuse_route()

    do_HEAD = do_GET  # `Wire` leaves the body out

    def refuse_route(self) -> None:
        """Answers 405 when the path exists for another method, else 404."""
        route = self.path.partition("?")[0]
        is_get = route in GET_ROUTES or route.startswith(MODEL_ROUTE)
        if is_get or route in schema.PATHS:
            self._allow = "GET, HEAD, OPTIONS" if is_get else "POST, OPTIONS"
            self.end_with(
                BadRequest(
                    f"The method is not allowed here; allowed are {self._allow}.",
                    status=405,
                    code="method_not_allowed",
                )
            )
        else:
            none = BadRequest("There is no such path.", status=404, code="not_found")
            self.end_with(none)

    do_PUT = do_PATCH = do_DELETE = do_TRACE = do_CONNECT = refuse_route

    def _send_status(self) -> None:
        query = parse_qs(self.path.partition("?")[2], keep_blank_values=True)
        asked = query.get("history", ["short"])[-1]
        if asked not in (*HISTORIES, "none"):
            names = ", ".join((*HISTORIES, "none"))
            self.end_with(BadRequest(f"history must be one of {names}.", "history"))
            return
        history = None if asked == "none" else asked
        body = self.response_generator.status.read(history)
        self.send_body(200, "application/json", body)

    def _set_cors_headers(self) -> None:
        # Pages from elsewhere may ask the API; what the server does is not theirs.
        if self.path.partition("?")[0] in STATUS:
            for name, value in status_page.HEADERS.items():
                self.send_header(name, value)
        else:
            super()._set_cors_headers()

    def _listed(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": self.created}

    def handle_models_request(self) -> None:
        """Lists what requests may name (`model_names`)."""
        names = self.response_generator.names.listed()
        body = {"object": "list", "data": [self._listed(name) for name in names]}
        self.send_json(200, body)

    def _send_model(self, name: str) -> None:
        """One model, by an id that the list has or by what it was started as."""
        if self.response_generator.names.knows(name):
            self.send_json(200, self._listed(name))
        else:
            self.end_with(ModelNotFound("There is no such model.", "model"))

    def handle_health_check(self) -> None:
        """Answers 200 when requests are served, else 503 with the reason."""
        health = self.response_generator.health
        thread = self.response_generator._generation_thread
        reason = health.reason
        if reason is None and not thread.is_alive():
            reason = "the generation thread has ended"
        if reason is None:
            body = {"status": "ok"}
        else:
            body = {"status": "unavailable", "state": health.state, "reason": reason}
        live = self.response_generator.live.summary()
        self.send_json(503 if reason else 200, {**body, **live})
