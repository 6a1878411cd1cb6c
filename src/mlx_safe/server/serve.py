"""``mlx-safe serve``: mlx_lm.server's own ``main`` with another ``run``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .. import Fault, errors, install, on_fault, testing
from .._command import CommandError, Parser
from ..forensics import startup
from ..memory.sizes import parse_size
from . import ranks, supervisor
from .body import DEFAULT_MAX_BYTES, Bodies
from .handover import Handover, Held, Message
from .mlx_lm import compat
from .wire import Resting

__all__ = ["check_paths", "run", "serve"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .condition import Condition
    from .overflow import Overflow

log = logging.getLogger("mlx_safe.server")

# Fewer tokens than a model's templates take are of no use to anyone.
KV_WINDOW_MIN = 32


def _own_parser() -> Parser:
    parser = Parser(
        prog="mlx-safe serve",
        add_help=False,
        allow_abbrev=False,
        description="mlx_lm.server, protected. Takes these options, and every "
        "option of mlx_lm.server, listed below.",
    )
    _add_recovery_flags(parser)
    _add_prompt_flags(parser)
    _add_memory_flags(parser)
    _add_model_flags(parser)
    return parser


def _add_recovery_flags(parser: Parser) -> None:
    parser.add_argument(
        "--allow-untested-mlx-lm",
        action="store_true",
        help="start with an mlx-lm newer than this mlx-safe was tested with, as "
        "long as it has all that the patch needs",
    )
    parser.add_argument(
        "--replay-attempts",
        type=_count,
        default=2,
        metavar="N",
        help="how often a request is run again after a fault of the GPU before its "
        "client gets a 503; 0: never (default: 2)",
    )
    parser.add_argument(
        "--stall-timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="a generation step that makes no progress for so long is fatal: clients "
        "get a 503, the process leaves with status 75; 0: never (default: 600)",
    )
    parser.add_argument(
        "--keepalive-after",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="a stream's comments begin so long after its request was read; until "
        "then, or its first token, what fails is answered with its own status "
        "(default: 5)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the server again when it ends, in a small parent process that "
        "keeps the port open meanwhile",
    )
    parser.add_argument(
        "--hold-seconds",
        type=_seconds,
        default=supervisor.HOLD_S,
        metavar="SECONDS",
        help="with --supervise: how long a request waits for the next server before "
        "its client gets a 503; 0: not at all (default: 60)",
    )


def _add_prompt_flags(parser: Parser) -> None:
    parser.add_argument(
        "--max-prompt-tokens",
        type=_positive,
        metavar="N",
        help="tokens that a prompt may have (default: what the model was made for)",
    )
    parser.add_argument(
        "--prompt-overflow-policy",
        choices=["error", "truncate"],
        default="error",
        help="what happens to a longer one: a 400 with code context_length_exceeded, "
        "or the oldest turns of the chat are left out (default: error)",
    )
    parser.add_argument(
        "--prompt-keep-tokens",
        type=_count,
        default=0,
        metavar="N",
        help="with truncate: tokens of the beginning that stay; of a chat, whole "
        "messages after the system prompt, which always stays (default: 0)",
    )
    parser.add_argument(
        "--max-kv-size",
        type=_window,
        metavar="N",
        help="tokens that a request's KV cache holds: the model sees the last N "
        "only, and answers get worse beyond them (default: no limit)",
    )


def _add_memory_flags(parser: Parser) -> None:
    parser.add_argument(
        "--max-request-bytes",
        type=_size,
        default=DEFAULT_MAX_BYTES,
        metavar="SIZE",
        help="how large the body of a request may be; a larger one is a 413 before it "
        "is read (default: 32M)",
    )
    parser.add_argument(
        "--max-active-memory-bytes",
        type=_size,
        metavar="SIZE",
        help="how much MLX may hold at any time, such as 20G (default: 90%% of what "
        "Metal recommends, or 75%% of the RAM without a GPU)",
    )
    parser.add_argument(
        "--max-active-kv-bytes",
        type=_size,
        metavar="SIZE",
        help="how much the KV caches of the requests that run may hold together "
        "(default: what the ceiling leaves)",
    )
    parser.add_argument(
        "--memory-wait",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a request that does not fit now waits for those that run "
        "before its client gets a 503; 0: not at all (default: 60)",
    )
    parser.add_argument(
        "--prompt-cache-bytes",
        type=_size,
        metavar="SIZE",
        help="how much the prompt cache may hold (default: half of what the model "
        "leaves below the ceiling)",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=_positive,
        metavar="N",
        help="how many tokens of a prompt are read at once; less when memory is "
        "short (default: 2048)",
    )


def _add_model_flags(parser: Parser) -> None:
    parser.add_argument(
        "--served-model-name",
        action="append",
        type=_name,
        default=[],
        metavar="NAME",
        help="a name for --model, which requests may use and /v1/models lists in the "
        "place of its path; may be given more than once",
    )
    parser.add_argument(
        "--only-served-model",
        action="store_true",
        help="requests may name nothing but the model that the server was started "
        "with: no other model, adapter or draft model",
    )
    parser.add_argument(
        "--allow-model-download",
        action="store_true",
        help="a request may name a model that is on the hub only: it is downloaded "
        "(default: what is not on this machine is a 404)",
    )


def _name(text: str) -> str:
    # One that no request could name: `schema.Name`.
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be a name, not {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    return value


def _window(text: str) -> int:
    value = _count(text)
    if value < KV_WINDOW_MIN:
        raise argparse.ArgumentTypeError(
            f"must be at least {KV_WINDOW_MIN}, not {text!r}"
        )
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
        if not 0 <= value <= 1e6:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds from 0 to 1000000, not {text!r}"
        ) from None
    return value


def serve(arguments: Sequence[str]) -> int:
    """Runs the protected server until it is told to stop.

    Raises:
        CommandError: it cannot start; the message says what to do.
    """
    parser = _own_parser()
    own, rest = parser.parse_known_args(list(arguments))
    # mlx-lm's own, read here because a mistake in them is a traceback there.
    for name in ("prompt_cache_bytes", "prefill_step_size"):
        if getattr(own, name) is not None:
            rest += ["--" + name.replace("_", "-"), str(getattr(own, name))]
    try:
        injections = testing.plan_from_environment()
    except ValueError as e:
        raise CommandError(str(e)) from e
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print("\noptions of mlx_lm.server:\n")
        sys.stdout.flush()
    elif own.supervise:
        if ranks.is_one_of_many():
            raise CommandError(
                "--supervise restarts one process, not all ranks; leave it out and "
                "have mlx.launch itself started again (docs/server.md)"
            )
        supervisor.replace_this_process([a for a in arguments if a != "--supervise"])
    server = compat.import_server(allow_untested=own.allow_untested_mlx_lm)
    compat.tell_mistakes_in_one_line(server)
    server.run = lambda host, port, model_provider, **_: run(
        server, host, port, model_provider, own, bool(injections)
    )
    sys.argv = ["mlx-safe serve", *rest]
    server.main()
    return 0


class _Server(ThreadingHTTPServer):
    # The default of 5 refuses connections when clients come all at once.
    request_queue_size = 128
    daemon_threads = True
    # Set before `serve_forever`. told: by a signal that it shall end.
    condition: Condition
    told = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._resting = Resting()
        self.handover = Handover.of_environment()
        # Connections until their handlers have begun, from then on, and those that
        # the next server is to have.
        self._taken: dict[Any, Held] = {}
        self._holds: dict[Any, Held] = {}
        self._left: set[Any] = set()
        super().__init__(*args, **kwargs)

    def held(self, connection: Any) -> Held:
        """What the supervisor keeps of ``connection``; asked by its handler."""
        found = self._holds[connection] = self._taken.pop(connection)
        return found

    def take_over(self) -> None:
        """Serves what was accepted before, by an earlier server or the supervisor."""

        def serve(connection: Any, held: Held) -> None:
            if not self.condition.arrive():
                return  # the supervisor has it still
            connection.setblocking(True)
            self._taken[connection] = held
            self.process_request(connection, _peer(connection))

        self.handover.take_over(serve)

    def leave_open(self, connection: Any) -> None:
        """The next server is to have ``connection``."""
        self._left.add(connection)

    # A client counts from before it is accepted until its connection is closed, but
    # not while that waits for another request.

    def get_request(self) -> Any:
        if not self.condition.arrive():
            time.sleep(0.05)  # it waits in the socket's queue, which stays readable
            raise ConnectionAbortedError("the server is leaving")
        try:
            connection, address = super().get_request()
        except OSError:
            self.condition.depart()
            raise
        # At once, and not by its thread: until then nobody else has it.
        self._taken[connection] = self.handover.hold(connection)
        return connection, address

    def rest(self, connection: Any) -> None:
        """``connection`` has its answer, and is kept."""
        self._resting.add(connection)
        self.condition.depart()

    def resume(self, connection: Any) -> None:
        """``connection`` has sent something, or ends."""
        self.condition.return_()
        self._resting.remove(connection)

    def count_reading(self) -> int:
        """Of those that count, those whose request the supervisor will have."""
        return sum(
            held.is_reading and connection not in self._resting
            for connection, held in list(self._holds.items())
        )

    def shutdown_request(self, request: Any) -> None:
        held = self._holds.pop(request, None) or self._taken.pop(request, None)
        if request not in self._left:
            super().shutdown_request(request)
            if held is not None:
                held.close()
        self.condition.depart()

    def service_actions(self) -> None:
        """Between two connections: not in the midst of accepting one."""
        if self.told:
            raise KeyboardInterrupt

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, ConnectionError):
            # It waits for nothing: checks of HAProxy end with a reset.
            log.debug("a client went away: %s", error)
        else:
            log.exception("a handler failed")


def run(
    server: Any,
    host: str,
    port: int,
    model_provider: Any,
    own: argparse.Namespace,
    injections: bool,
) -> None:
    """Stands in for ``mlx_lm.server.run``.

    The port is bound before the model is loaded: a port in use is noticed at
    once, and a client that comes early waits instead of being refused.
    """
    compat.check_provider(model_provider)
    check_paths(model_provider.cli_args)
    _check_kv_flags(own, model_provider.cli_args)
    _check_model_flags(own, model_provider.cli_args)
    # Not before mlx is known to be there, and sound: it imports it.
    from .overflow import Overflow

    overflow = Overflow(
        own.max_prompt_tokens, own.prompt_overflow_policy, own.prompt_keep_tokens
    )
    install(on_terminate="drain", signals=True)
    # MLX must be imported and the classes derived before the thread starts.
    import mlx.core as mx

    from .mlx_lm.handler import ProtectedHandler
    from .recorder import start_sampler

    is_first = mx.distributed.init().rank() == 0
    fingerprint = server.get_system_fingerprint()
    generator: Any = None
    ProtectedHandler.bodies = Bodies(own.max_request_bytes)

    ProtectedHandler.keepalive_after_s = own.keepalive_after

    def handle(*args: Any) -> None:
        handler: Any = ProtectedHandler  # its signature is mlx-lm's, not `Wire`'s
        handler(generator, *args, system_fingerprint=fingerprint)

    startup.tell()  # the log is set up by now
    watch = on_fault(lambda fault: _leave_on_terminate(fault, lambda: generator))
    httpd = _bind(host, port, handle) if is_first else None
    if is_first:
        log.info("listening at http://%s:%s; loading the model", host, port)
    _patch(server, lambda: generator)

    def ready() -> None:
        _tell_of_the_start(ready=True)
        if httpd is not None:
            httpd.handover.tell(Message.READY)

    _tell_of_the_start(ready=False)
    generator = _make_generator(own, overflow, model_provider, injections, ready)
    start_sampler(generator.admission.figures)
    with watch:
        if httpd is None:
            _follow_the_first(generator)
        else:
            _serve_until_told(httpd, generator)


def _tell_of_the_start(ready: bool) -> None:
    """Lets ``Retry-After`` of a restart be what the last start took."""
    from .replies import a_start_takes

    seconds = supervisor.start_took(ready)
    if seconds is not None:
        a_start_takes(seconds)


def _leave_on_terminate(fault: Fault, generator: Callable[[], Any]) -> None:
    from .condition import EXIT_REPLACE

    if fault.source != "terminate":
        return
    for _ in range(500):  # it may come while the generator is being made
        if generator() is not None:
            generator().recovery.give_up(errors.from_faults([fault]))
        time.sleep(0.01)
    os._exit(EXIT_REPLACE)


def _patch(server: Any, generator: Callable[[], Any]) -> None:
    """Has mlx-lm's functions pass by ``generator``, which need not be made yet."""
    from .logprobs import top_logprobs

    compat.load_lazily(server)
    compat.keep_processors_in_place()
    make_sampler, make_batch = server._make_sampler, server.BatchGenerator
    make_processors = server._make_logits_processors
    server._make_sampler = lambda args, tokenizer: generator().resume_sampler(
        make_sampler, args, tokenizer
    )
    server._make_logits_processors = lambda args: generator().resume_processors(
        make_processors, args
    )
    server._format_top_logprobs = lambda *args: generator().top_logprobs(
        top_logprobs, *args
    )
    server.BatchGenerator = lambda *args, **kwargs: generator().make_batch(
        make_batch, *args, **kwargs
    )


def _make_generator(
    own: argparse.Namespace,
    overflow: Overflow,
    model_provider: Any,
    injections: bool,
    on_ready: Callable[[], None],
) -> Any:
    """Starts the generation thread, which loads the model."""
    from .admission import MemoryFlags
    from .condition import Condition
    from .generator import ProtectedResponseGenerator
    from .mlx_lm.prompt_cache import PromptCache
    from .model_names import ModelNames

    return ProtectedResponseGenerator(
        model_provider,
        PromptCache(
            model_provider.cli_args.prompt_cache_size,
            model_provider.cli_args.prompt_cache_bytes,
        ),
        Condition(on_ready),
        replay_attempts=own.replay_attempts,
        stall_timeout_s=own.stall_timeout,
        overflow=overflow,
        max_kv_size=own.max_kv_size,
        memory=MemoryFlags(
            max_active_kv=own.max_active_kv_bytes,
            max_active_memory=own.max_active_memory_bytes,
            wait_s=own.memory_wait,
        ),
        names=ModelNames(
            model_provider.cli_args,
            served=own.served_model_name,
            only_served=own.only_served_model,
            download=own.allow_model_download,
        ),
        injections=injections,
        # By itself, a server has always let those wait that came early.
        hold_s=own.hold_seconds or None if supervisor.is_supervised() else None,
    )


def _follow_the_first(generator: Any) -> None:
    # Without clients there is nobody to answer: signals kill, Control-C as well,
    # and a status that is not 0 makes mlx.launch end the other ranks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    generator.join()
    generator.stop()


def _serve_until_told(httpd: _Server, generator: Any) -> None:
    # SIGHUP: mlx.launch ends a rank on another host by closing its terminal.
    told_by = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    told_by = [n for n in told_by if signal.getsignal(n) is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        # Once is enough: what follows takes seconds. Not SIG_IGN: Python complains
        # of a signal that is ignored when it has arrived already.
        for n in told_by:
            signal.signal(n, lambda *_: None)
        httpd.told = True

    for n in told_by:
        signal.signal(n, stop)
    httpd.condition = generator.condition
    httpd.condition.count_held = httpd.count_reading
    try:
        httpd.handover.tell(Message.LISTENS)
        httpd.take_over()
        httpd.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        log.info("stopping")
    finally:
        httpd.server_close()
        # Not through the interpreter's end: MLX's static objects and the daemon
        # threads of handlers do not always survive it (seen with MLX 0.32.4).
        generator.stop()


def _peer(connection: Any) -> Any:
    try:
        return connection.getpeername()
    except OSError:
        return ("-", 0)  # its client has left meanwhile


def _bind(host: str, port: int, handle: Any) -> _Server:
    import socket

    inherited = os.environ.pop(supervisor.LISTEN_FD, None)
    if inherited is not None:
        listener = socket.socket(fileno=int(inherited))
        server = _Server(listener.getsockname(), handle, bind_and_activate=False)
        server.socket.close()
        server.socket = listener
        return server
    family, address = supervisor.find_address(host, port)
    try:
        kind = type("_Server", (_Server,), {"address_family": family})
        bound: _Server = kind(address, handle)
        return bound
    except OSError as e:
        raise supervisor.cannot_listen(host, port, e) from e


def check_paths(args: argparse.Namespace) -> None:
    """Says at once what would fail in the generation thread minutes later."""
    for flag in ("model", "draft_model", "adapter_path"):
        value = getattr(args, flag, None)
        if not value:
            continue
        option = "--" + flag.replace("_", "-")
        if _is_there(Path(value), f"{option} {value}"):
            config = Path(value) / "config.json"
            if flag != "adapter_path" and not _is_there(config, f"{option} {value}"):
                raise CommandError(
                    f"{option} {value}: there is no config.json in it; it must be "
                    "a directory with an MLX model"
                )
        elif flag == "adapter_path" or not _may_be_on_the_hub(value):
            # mlx-lm opens what it is given, and --model=~/m is no word of the shell's.
            home = " (~ stands for nothing here)" if value.startswith("~") else ""
            raise CommandError(
                f"{option} {value}: there is no such directory{home}; give the path of "
                "an MLX model, or a hub name like mlx-community/SmolLM2-135M-Instruct"
            )


def _is_there(path: Path, given: str) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise CommandError(f"{given}: cannot be read: {e.strerror}") from e
    return True


def _check_kv_flags(own: argparse.Namespace, args: argparse.Namespace) -> None:
    if args.prompt_cache_size < 0:
        raise CommandError("--prompt-cache-size: must be 0 or more")
    # With 0 mlx-lm takes requests and never begins with them.
    for flag in ("prompt_concurrency", "decode_concurrency"):
        if getattr(args, flag) < 1:
            option = "--" + flag.replace("_", "-")
            raise CommandError(f"{option} {getattr(args, flag)}: must be at least 1")
    if own.max_kv_size is None:
        return
    # mlx-lm cannot rewind or quantize the rotating caches that it needs.
    for flag in ("draft_model", "kv_bits"):
        if getattr(args, flag, None):
            option = "--" + flag.replace("_", "-")
            raise CommandError(f"--max-kv-size cannot be used with {option}")


def _check_model_flags(own: argparse.Namespace, args: argparse.Namespace) -> None:
    for flag in ("served_model_name", "only_served_model"):
        if getattr(own, flag) and not args.model:
            raise CommandError(f"--{flag.replace('_', '-')} needs --model")
    if own.only_served_model and own.allow_model_download:
        raise CommandError(
            "--only-served-model cannot be used with --allow-model-download"
        )


def _may_be_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
