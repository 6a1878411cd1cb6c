"""The HTTP server: accepts connections, and counts those that wait for an answer."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from . import supervisor
from .handover import Handover, Held
from .health import Health
from .tls import Tls
from .wire import Resting

__all__ = ["Server", "bind"]

log = logging.getLogger("mlx_safe.server")


class Server(ThreadingHTTPServer):
    """One thread for each connection, which a supervisor's next server may take over.

    Attributes:
        health: of the server; to be set before ``serve_forever``.
        stop_requested: set by a signal handler; ends ``serve_forever`` with a
            KeyboardInterrupt.
        handover: the channel to the supervisor.
        tls: encrypts what clients see; None: nothing is.
    """

    # The default of 5 refuses connections when clients come all at once.
    request_queue_size = 128
    daemon_threads = True
    health: Health
    stop_requested = False
    tls: Tls | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resting = Resting()
        self.handover = Handover.of_environment()
        # Connections until their handlers have begun, from then on, and those that
        # the next server is to have.
        self._taken: dict[socket.socket, Held] = {}
        self._holds: dict[socket.socket, Held] = {}
        self._left: set[socket.socket] = set()
        super().__init__(*args, **kwargs)

    def held(self, connection: socket.socket) -> Held:
        """What the supervisor keeps of ``connection``; asked by its handler."""
        found = self._holds[connection] = self._taken.pop(connection)
        return found

    def take_over(self) -> None:
        """Serves what was accepted before, by an earlier server or the supervisor."""

        def serve(connection: socket.socket, held: Held) -> None:
            if not self.health.arrive():
                return  # the supervisor has it still
            connection.setblocking(True)
            self._taken[connection] = held
            self.process_request(connection, _peer(connection))

        self.handover.take_over(serve)

    def leave_open(self, connection: socket.socket) -> None:
        """The next server is to have ``connection``."""
        self._left.add(connection)

    # A client counts from before it is accepted until its connection is closed, but
    # not while that waits for another request.

    def get_request(self) -> tuple[socket.socket, object]:
        """Accepts a connection; raises OSError when there is none, or no more may."""
        if not self.health.arrive():
            time.sleep(0.05)  # it waits in the socket's queue, which stays readable
            raise ConnectionAbortedError("the server is leaving")
        try:
            connection, address = super().get_request()
        except OSError:
            self.health.depart()
            raise
        if self.tls is not None:
            # Nobody else can go on with its session.
            connection = self.tls.wrap(connection)
            self._taken[connection] = Held(self.handover, 0, None)
        else:
            # At once, and not by its thread: until then only this process has it.
            self._taken[connection] = self.handover.hold(connection)
        return connection, address

    def rest(self, connection: socket.socket) -> None:
        """``connection`` has its answer, and is kept."""
        self._resting.add(connection)
        self.health.depart()

    def resume(self, connection: socket.socket) -> None:
        """``connection`` has sent something, or ends."""
        self.health.return_()
        self._resting.remove(connection)

    def count_reading(self) -> int:
        """Of those that count, those whose request the supervisor will have."""
        return sum(
            held.is_reading and connection not in self._resting
            for connection, held in list(self._holds.items())
        )

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection, unless the next server is to have it."""
        held = self._holds.pop(request, None) or self._taken.pop(request, None)
        if request not in self._left:
            super().shutdown_request(request)
            if held is not None:
                held.close()
        self.health.depart()

    def service_actions(self) -> None:
        """Between two connections: not in the midst of accepting one."""
        if self.stop_requested:
            raise KeyboardInterrupt

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs what a handler has ended with."""
        error = sys.exc_info()[1]
        if isinstance(error, ConnectionError):
            # It waits for nothing: checks of HAProxy end with a reset.
            log.debug("a client went away: %s", error)
        else:
            log.exception("a handler failed")


def _peer(connection: socket.socket) -> object:
    try:
        return connection.getpeername()
    except OSError:
        return ("-", 0)  # its client has left meanwhile


def bind(
    host: str, port: int, handle: Callable[..., None], tls: Tls | None = None
) -> Server:
    """A server at this address, or on the socket that the supervisor has bound.

    Args:
        handle: makes a handler; called with a connection, its address and the server.

    Raises:
        CommandError: the address cannot be bound.
    """
    inherited = os.environ.pop(supervisor.LISTEN_FD, None)
    if inherited is not None:
        listener = socket.socket(fileno=int(inherited))
        server = Server(listener.getsockname(), handle, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        server.tls = tls
        return server
    family, address = supervisor.find_address(host, port)
    try:
        kind = type("Server", (Server,), {"address_family": family})
        bound: Server = kind(address, handle)
        bound.tls = tls
        return bound
    except OSError as e:
        raise supervisor.cannot_listen(host, port, e) from e
