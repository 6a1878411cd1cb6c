"""``mlx-safe serve``: mlx_lm.server's own ``main`` with another ``run``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import Fault, _autostart, _reports, errors, install, on_fault, require, status
from .._command import CommandError, Parser, need_mlx, will_print
from ..forensics import startup
from ..kv.directory import Directory, NotOurs
from ..kv.store import DISK_BYTES, Limits
from . import access, http_server, logs, ranks, supervisor
from .body import Bodies
from .configuration import Settings, log_format_of, printed, resolve
from .flag_checks import check_flags
from .flags import own_parser, whole_parser
from .handover import Handover, Message
from .health import EXIT_REPLACE, Health
from .heap import give_back_what_is_free
from .mlx_lm import requirements
from .mlx_lm.patch import parser_of, patch, run_main
from .mlx_lm.protocols.models import ModelProvider
from .mlx_lm.protocols.server import Server
from .replies import a_start_takes
from .tls import Tls

__all__ = ["run", "serve"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .generator import ProtectedResponseGenerator
    from .overflow import Overflow
    from .parts import Parts

log = logging.getLogger("mlx_safe.server")

# How long a fatal fault waits for a generator that is still being made.
GENERATOR_WAIT_S = 5.0
GENERATOR_TURN_S = 0.01


def serve(arguments: Sequence[str]) -> int:
    """Runs the protected server until a signal stops it.

    Args:
        arguments: the command line after ``mlx-safe serve``.

    Returns:
        the exit status, after ``--help``, and 2 where it cannot start: a line says
        what to do. A server that has run ends the process itself: with 0, or with 75
        when it must be replaced.
    """
    try:
        return _serve(arguments)
    except CommandError as e:
        logs.refuse(str(e), log_format_of(arguments, os.environ))
        return supervisor.USER_MISTAKE


def _serve(arguments: Sequence[str]) -> int:
    parser = own_parser()
    # mlx-lm's flags are known when it is imported, which the supervisor does not do.
    settings = resolve(parser, arguments, os.environ, partial=True)
    if settings.values.help:
        return _print_help(parser)
    with settings.with_places():
        return _begin(settings, arguments)


def _begin(settings: Settings, arguments: Sequence[str]) -> int:
    """With our own flags."""
    options = settings.values
    logs.set_up(options.log_level, options.log_format, options.log_file)
    try:
        _autostart.begin(_tell_of_a_plan)
    except ValueError as e:
        raise CommandError(str(e)) from None
    keys = access.read_keys(options.api_key, options.api_key_file)
    if settings.sources["api_key"] == options.config is not None:
        access.warn_of_others(options.config, f"--config {options.config}")
    tls = None
    if options.ssl_certfile is not None:
        tls = Tls(options.ssl_certfile, options.ssl_keyfile)
    _name_server(options.port, _model_of(arguments))
    is_child = supervisor.is_supervised()
    if options.supervise and not is_child and not options.print_config:
        supervisor.replace_this_process(
            [a for a in arguments if a != "--supervise"],
            options.host,
            options.port,
            options.hold_seconds,
            options.ssl_certfile,
            options.log_level,
            options.log_format,
            options.log_file,
        )
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until it serves, not a KeyboardInterrupt. CPython prints and drops one that
        # comes in a destructor or a callback. At the interpreter's end it would wait
        # for mlx-lm's generation thread, which is no daemon.
        _reports.stop_by(signal.SIGINT)
    home = None
    if ranks.is_one_of_many():
        need_mlx()
        home = ranks.Home()
        try:
            home.wait_made()
        except Exception as e:
            # One of them may be about to start again.
            log.error("the ranks cannot meet: %s", e)
            return EXIT_REPLACE
    _serve_here(arguments, options.allow_untested_mlx_lm, home, keys, tls)
    return 0


def _serve_here(
    arguments: Sequence[str],
    allow_untested: bool,
    home: ranks.Home | None,
    keys: tuple[str, ...],
    tls: Tls | None,
) -> None:
    """From where mlx-lm is imported, and all flags are known."""
    give_back_what_is_free()
    with ranks.signals_kept():  # mlx-lm makes the group in its constructors
        server = requirements.import_server(allow_untested=allow_untested)
    logs.take_over()
    mlx_lm = parser_of(server)
    requirements.check_parser(mlx_lm)
    parser = whole_parser(mlx_lm)
    settings = resolve(parser, arguments, os.environ)
    with settings.with_places():
        _serve_with(server, mlx_lm, parser, settings, home, keys, tls)


def _serve_with(
    server: Server,
    mlx_lm: argparse.ArgumentParser,
    parser: Parser,
    settings: Settings,
    home: ranks.Home | None,
    keys: tuple[str, ...],
    tls: Tls | None,
) -> None:
    options = settings.values
    check_flags(options, options)
    for name in settings.unknown:
        log.warning("%s in the environment belongs to no flag", name)
    if options.print_config:
        will_print()
        print(printed(parser, settings), end="")
        return
    _name_server(options.port, options.model)
    if home is not None:
        _check_nccl(options.pipeline)
    theirs = {a.dest: getattr(options, a.dest) for a in mlx_lm._actions}

    def run_here(host: str, port: int, model_provider: ModelProvider) -> None:
        run(
            *(server, host, port, model_provider, options, home),
            may_ask=access.Access(keys, options.status_page),
            tls=tls,
        )

    run_main(server, run_here, argparse.Namespace(**theirs))


_server: dict[str, object] = {}


def _name_server(port: int, model: str | None) -> None:
    """Reports say whose they are, one of a start that is stopped as well."""
    global _server
    _server = {"port": str(port), "model": model}
    _reports.name_process(server=_server)


def _model_of(arguments: Sequence[str]) -> str | None:
    """As the flags will have it, before those of mlx-lm are known."""
    parser = own_parser()
    parser.add_argument("--model")
    found = resolve(parser, arguments, os.environ, partial=True)
    model: str | None = found.values.model
    return model


def _tell_of_a_plan(what: str) -> None:
    log.warning("a planned fault has not struck: %s", what)


def _print_help(own: Parser) -> int:
    will_print()
    try:
        parser = whole_parser(parser_of(requirements.import_server()))
    except CommandError:
        own.print_help()
        print("The flags of mlx_lm.server are missing here:", flush=True)
        raise
    parser.print_help()
    return 0


def _check_nccl(pipeline: bool) -> None:
    if not ranks.uses_nccl():
        return
    if pipeline:
        raise CommandError(
            "--pipeline: MLX cannot send from one rank to another with NCCL (0.32); "
            "leave it out, or start mlx.launch with --backend ring"
        )
    # Not before MLX is known to be there: it imports it.
    from .mlx_lm.compat import meet_on_the_gpu

    meet_on_the_gpu()


def run(
    server: Server,
    host: str,
    port: int,
    model_provider: ModelProvider,
    options: argparse.Namespace,
    home: ranks.Home | None = None,
    *,
    may_ask: access.Access,
    tls: Tls | None = None,
) -> None:
    """Stands in for ``mlx_lm.server.run``. Main thread; ends the process.

    The port is bound before the model is loaded: a port in use is noticed at
    once, and a client that comes early waits instead of being refused.

    Args:
        server: the module ``mlx_lm.server``.
        host, port: the address to listen on.
        model_provider: mlx-lm's ``ModelProvider``; has no model yet.
        options: the flags.
        home: where the group of ranks was made; None: there is one rank.
        may_ask: who is answered. tls: None: connections are plain.

    Raises:
        CommandError: it cannot start; the message says what to do.
    """
    requirements.check_provider(model_provider)
    overflow = _overflow(options)
    disk = _open_disk(options)
    install(on_terminate="drain", signals=True)
    _check_hooks(options.require_hooks)
    has_reports = _check_reports()
    # MLX must be imported and the classes derived before the thread starts.
    import mlx.core as mx

    is_first = mx.distributed.init().rank() == 0
    generator: ProtectedResponseGenerator | None = None
    handle = _handler(server, options, may_ask, lambda: generator)
    if has_reports:
        startup.tell(server=_server)
    watch = on_fault(
        lambda fault: _leave_on_terminate(fault, lambda: generator), drains=True
    )
    httpd = http_server.bind(host, port, handle, tls) if is_first else None
    if httpd is not None:
        _tell_address(httpd, host, may_ask, bool(model_provider.cli_args.model))

    def parts() -> Parts:
        assert generator is not None
        return generator.parts

    patch(server, parts)

    handover = Handover.of_environment() if httpd is None else httpd.handover

    def ready() -> None:
        _set_retry_after(ready=True)
        handover.tell(Message.READY)
        if not is_first:  # the others see no request that is completed
            handover.tell(Message.WORKED)

    _set_retry_after(ready=False)
    generator = _make_generator(options, overflow, model_provider, ready, home, disk)
    with watch:
        _run_until_signal(httpd, generator)


def _run_until_signal(
    httpd: http_server.Server | None, generator: ProtectedResponseGenerator
) -> None:
    from .recorder import start_sampler

    start_sampler(
        generator.headroom.figures, generator.figures, generator.status.sample
    )
    if httpd is None:
        _follow_the_first(generator)
    else:
        _serve_until_signal(httpd, generator)


def _overflow(options: argparse.Namespace) -> Overflow:
    # Not before mlx is known to be there, and sound: it imports it.
    from .overflow import Overflow

    return Overflow(
        options.max_prompt_tokens,
        options.prompt_overflow_policy,
        options.prompt_keep_tokens,
    )


def _handler(
    server: Server,
    options: argparse.Namespace,
    may_ask: access.Access,
    generator: Callable[[], ProtectedResponseGenerator | None],
) -> Callable[..., None]:
    """What answers a connection, on a thread of its own."""
    from .handler import ProtectedHandler

    fingerprint = server.get_system_fingerprint()
    ProtectedHandler.bodies = Bodies(options.max_request_bytes)
    ProtectedHandler.keepalive_after_s = options.keepalive_after
    ProtectedHandler.may_ask = may_ask

    def handle(*args: object) -> None:
        handler: Any = ProtectedHandler  # its signature is mlx-lm's, not `Wire`'s
        handler(generator(), *args, system_fingerprint=fingerprint)

    return handle


def _tell_address(
    httpd: http_server.Server, host: str, may_ask: access.Access, has_model: bool
) -> None:
    address, port = httpd.server_address[:2]
    scheme = "http" if httpd.tls is None else "https"
    name = f"[{host}]" if ":" in host else host
    then = "loading the model" if has_model else "no --model, so requests must name one"
    log.info("listening at %s://%s:%s; %s", scheme, name, port, then)
    if httpd.tls is not None:
        httpd.tls.warn_of_its_end()
    if may_ask.is_open and not access.is_loopback(str(address)):
        log.warning(
            "%s can be reached from other machines, and there is no --api-key: "
            "anyone on the network can use this server",
            host,
        )


def _check_hooks(required: bool) -> None:
    """On a Mac it warns, or fails, without hooks; elsewhere there are none."""
    try:
        require()
    except RuntimeError as e:
        if required:
            raise CommandError(f"--require-hooks: {e}") from e
        log.warning("Metal is not hooked, and a fault may end the process: %s", e)


def _check_reports() -> bool:
    """Whether there is a directory for crash reports; a line says why not."""
    found = status()
    if found.report_dir is None:
        why = "; ".join(r for r in found.reasons if "crash reports" in r)
        log.warning("nothing will say what ends this server: %s", why)
    return found.report_dir is not None


def _open_disk(options: argparse.Namespace) -> Directory | None:
    if options.kv_dir is None:
        return None
    if ranks.is_one_of_many():
        raise CommandError("--kv-dir cannot be used with more than one rank")
    try:
        found = Directory(options.kv_dir)
    except NotOurs as e:
        raise CommandError(f"--kv-dir {e}") from e
    if not found.is_private:
        log.warning("--kv-dir %s: others can read it", options.kv_dir)
    return found


def _set_retry_after(ready: bool) -> None:
    """Lets ``Retry-After`` of a restart be what the last start took."""
    seconds = supervisor.start_took(ready)
    if seconds is not None:
        a_start_takes(seconds)


def _leave_on_terminate(
    fault: Fault, generator: Callable[[], ProtectedResponseGenerator | None]
) -> None:
    if fault.source != "terminate":
        return
    for _ in range(round(GENERATOR_WAIT_S / GENERATOR_TURN_S)):
        made = generator()
        if made is not None:
            made.recovery.give_up(errors.from_faults([fault]))
        time.sleep(GENERATOR_TURN_S)
    os._exit(EXIT_REPLACE)


def _make_generator(
    options: argparse.Namespace,
    overflow: Overflow,
    model_provider: ModelProvider,
    on_ready: Callable[[], None],
    home: ranks.Home | None,
    disk: Directory | None,
) -> ProtectedResponseGenerator:
    """Starts the generation thread, which loads the model."""
    from .generator import ProtectedResponseGenerator
    from .headroom import MemoryFlags
    from .mlx_lm.kv_tier import KVTier
    from .mlx_lm.prompt_cache import PromptCache
    from .model_names import ModelNames

    cli_args = model_provider.cli_args
    prompt_cache = PromptCache(cli_args.prompt_cache_size, cli_args.prompt_cache_bytes)
    if disk is not None:
        limits = Limits(options.kv_disk_bytes or DISK_BYTES, free=options.kv_free_bytes)
        prompt_cache.disk = KVTier(disk, limits)
    return ProtectedResponseGenerator(
        model_provider,
        prompt_cache,
        Health(on_ready),
        replay_attempts=options.replay_attempts,
        stall_timeout_s=options.stall_timeout,
        step_seconds=options.step_seconds,
        overflow=overflow,
        max_kv_size=options.max_kv_size,
        memory=MemoryFlags(
            max_active_kv=options.max_active_kv_bytes,
            max_active_memory=options.max_active_memory_bytes,
            wait_s=options.memory_wait,
        ),
        names=ModelNames(
            cli_args,
            served=options.served_model_name,
            only_served=options.only_served_model,
            download=options.allow_model_download,
        ),
        home=home,
        # Without a supervisor, requests wait for the model as long as it takes.
        hold_s=options.hold_seconds if supervisor.is_supervised() else None,
    )


def _follow_the_first(generator: ProtectedResponseGenerator) -> None:
    # It has no clients to answer: signals kill it, Control-C as well, and a status
    # that is not 0 makes mlx.launch end the other ranks.
    generator.join()
    generator.stop()


def _serve_until_signal(
    httpd: http_server.Server, generator: ProtectedResponseGenerator
) -> None:
    # SIGHUP: mlx.launch ends a rank on another host by closing its terminal.
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        # Once is enough: what follows takes seconds. Not SIG_IGN: Python complains
        # of a signal that is ignored when it has arrived already.
        for n in numbers:
            signal.signal(n, lambda *_: None)
        httpd.stop_requested = True

    for n in numbers:
        signal.signal(n, stop)
    httpd.health = generator.health
    if httpd.tls is not None:
        httpd.health.drain = httpd.tls.drain
    httpd.health.count_held = httpd.count_reading
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
