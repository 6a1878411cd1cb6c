"""HTTPS: what is encrypted outside is plain inside.

All that reads and watches connections (`wire`, `disconnects`) knows sockets, peeks at
them and polls them, which a TLS session does not allow. So each connection gets a pair
of sockets: the handler has one end, and a thread here carries bytes between the other
one and the client.
"""

from __future__ import annotations

import contextlib
import logging
import re
import select
import socket
import ssl
import threading
import time

from .._command import CommandError, read_file

__all__ = ["Tls"]

log = logging.getLogger("mlx_safe.server")

HANDSHAKE_TIMEOUT_S = 10.0
PIECE = 1 << 16
# How long the process that ends waits until all is with the clients.
DRAIN_S = 2.0
DRAIN_TURN_S = 0.01
# Those that renew by themselves do it weeks before.
SOON_S = 14 * 86400
# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
OF_DATE = (9, 10)


def _look_for(what: str, path: str, given: str) -> None:
    # OpenSSL has the same reason for a certificate and for a key: "PEM lib".
    begin = rf"^-----BEGIN ([A-Z]+ )?{what}-----".encode()
    if not re.search(begin, read_file(path, given), re.MULTILINE):
        raise CommandError(f"{given}: there is no {what.lower()} (PEM) in it")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "it is damaged").replace("_", " ").lower()


class Tls:
    """The certificate of one server, and the connections that are open with it.

    Raises:
        CommandError: the certificate or its key cannot be used; with the flag.
    """

    def __init__(self, certificate: str, key: str | None) -> None:
        def no_password() -> str:
            raise CommandError(f"--ssl-keyfile {key or certificate}: it has a password")

        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_alpn_protocols(["http/1.1"])
        given = f"--ssl-certfile {certificate}"
        _look_for("CERTIFICATE", certificate, given)
        if key is None:
            _look_for("PRIVATE KEY", certificate, f"{given}, without --ssl-keyfile")
        else:
            _look_for("PRIVATE KEY", key, f"--ssl-keyfile {key}")
            given += f" --ssl-keyfile {key}"
        try:
            self._context.load_cert_chain(certificate, key, no_password)
        except ssl.SSLError as e:
            raise CommandError(f"{given}: cannot be used: {_reason(e)}") from None
        except OSError as e:  # it has gone meanwhile
            raise CommandError(f"{given}: cannot be read: {e.strerror}") from None
        self._certificate = certificate
        self._lock = threading.Lock()
        self._open: set[_Pump] = set()

    def warn_of_its_end(self) -> None:
        """Logs it where clients refuse the certificate, or soon will."""
        file = self._certificate
        try:
            ends = self._shown_to_a_client()["notAfter"]
        except ssl.SSLError as e:
            why = getattr(e, "verify_message", None) or _reason(e)
            if getattr(e, "verify_code", None) in OF_DATE:
                log.warning(
                    "--ssl-certfile %s: clients refuse it (%s): put one there that "
                    "is valid on %s and restart, or, where that is not today's date, "
                    "set the clock",
                    *(file, why, time.strftime("%Y-%m-%d")),
                )
            else:
                log.warning(
                    "--ssl-certfile %s: clients refuse it (%s): put another one "
                    "there and restart",
                    *(file, why),
                )
            return
        except OSError:
            return  # it has gone since it was read, and the next start says so
        seconds = ssl.cert_time_to_seconds(str(ends))
        if seconds - time.time() < SOON_S:
            log.warning(
                "--ssl-certfile %s: it ends on %s: put a new one there and restart "
                "before",
                *(file, ends),
            )

    def _shown_to_a_client(self) -> dict[str, object]:
        """As `ssl.SSLSocket.getpeercert`, by a handshake with a client of our own.

        `ssl` (Python 3.14) reads no certificate's dates from a file.

        Raises:
            ssl.SSLError: the client refuses it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        # Clients may know who has signed it, and this machine need not.
        context.load_verify_locations(self._certificate)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(back, there)
        server = self._context.wrap_bio(there, back, server_side=True)
        for end in (client, server) * 3:  # TLS 1.3 needs three turns, 1.2 five
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        return dict(client.getpeercert() or {})

    def wrap(self, connection: socket.socket) -> socket.socket:
        """The handler's end of ``connection``, which a thread takes over."""
        inner, ours = socket.socketpair()
        pump = _Pump(self._context, connection, ours)

        def run() -> None:
            try:
                pump.run()
            finally:
                with self._lock:
                    self._open.discard(pump)

        with self._lock:
            self._open.add(pump)
        threading.Thread(target=run, name="mlx-safe-tls", daemon=True).start()
        return inner

    def drain(self) -> None:
        """Waits until what handlers have written is sent, `DRAIN_S` at most."""
        for _ in range(round(DRAIN_S / DRAIN_TURN_S)):
            with self._lock:
                if not any(pump.has_unsent for pump in self._open):
                    return
            time.sleep(DRAIN_TURN_S)


class _Pump:
    """One connection: ``outer`` is the client's, ``inner`` the handler's."""

    def __init__(
        self, context: ssl.SSLContext, outer: socket.socket, inner: socket.socket
    ) -> None:
        self._context = context
        self._outer = outer
        self._inner = inner
        # Of the client, and for it.
        self._received = b""
        self._pending = b""
        self._client_sends = True
        self._wants_write = False

    @property
    def has_unsent(self) -> bool:
        """Something that the handler has written is not with the client yet."""
        try:
            poller = select.poll()
            poller.register(self._inner, select.POLLIN)
            waiting = any(event & select.POLLIN for _, event in poller.poll(0))
        except (OSError, ValueError):  # closed
            return False
        return bool(self._pending) or waiting

    def run(self) -> None:
        with self._inner, self._outer, contextlib.suppress(OSError, ValueError):
            self._outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            self._outer.settimeout(HANDSHAKE_TIMEOUT_S)
            with self._shake_hands() as client:
                client.setblocking(False)
                self._inner.setblocking(False)
                self._carry(client)

    def _shake_hands(self) -> ssl.SSLSocket:
        """Raises OSError, as `ssl.SSLError` is: such a client is closed."""
        try:
            return self._context.wrap_socket(self._outer, server_side=True)
        except OSError as e:
            # Not more than DEBUG: checks of a load balancer connect and leave.
            why = getattr(e, "reason", None) or e.strerror or str(e)
            log.debug("a client and this server cannot agree on TLS: %s", why)
            raise

    def _carry(self, client: ssl.SSLSocket) -> None:
        while True:
            self._wants_write = False
            moved = self._from_client(client)
            back = self._to_client(client)
            if back is None:
                self._say_goodbye(client)
                return
            if not moved and not back:
                self._wait(client)

    def _from_client(self, client: ssl.SSLSocket) -> bool:
        """Whether anything was moved towards the handler."""
        if self._client_sends and not self._received:
            try:
                self._received = client.recv(PIECE)
                if not self._received:
                    self._client_sends = False
                    self._inner.shutdown(socket.SHUT_WR)
            except ssl.SSLWantReadError:
                return False
            except ssl.SSLWantWriteError:
                self._wants_write = True
                return False
        with contextlib.suppress(BlockingIOError):
            sent = self._inner.send(self._received) if self._received else 0
            self._received = self._received[sent:]
            return sent > 0
        return False

    def _to_client(self, client: ssl.SSLSocket) -> bool | None:
        """The same towards the client; None: the handler has closed its end."""
        if not self._pending:
            try:
                self._pending = self._inner.recv(PIECE)
            except BlockingIOError:
                return False
            if not self._pending:
                return None
        try:
            self._pending = self._pending[client.send(self._pending) :]
            return True
        except ssl.SSLWantWriteError:
            self._wants_write = True
        except ssl.SSLWantReadError:
            pass
        return False

    def _wait(self, client: ssl.SSLSocket) -> None:
        poller = select.poll()
        # Only what is waited for: of one that has hung up poll tells each time.
        wanted = select.POLLOUT if self._wants_write else 0
        wanted |= select.POLLIN if self._client_sends and not self._received else 0
        if wanted or self._pending:
            poller.register(client, wanted or select.POLLIN)
        wanted = select.POLLIN if not self._pending else 0
        wanted |= select.POLLOUT if self._received else 0
        if wanted:
            poller.register(self._inner, wanted)
        poller.poll()

    def _say_goodbye(self, client: ssl.SSLSocket) -> None:
        """The handler is done: the end of TLS, by which no client takes it for cut."""
        client.settimeout(1.0)
        with contextlib.suppress(OSError):
            client.unwrap()
