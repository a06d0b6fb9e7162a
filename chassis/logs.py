"""JSON log lines that cannot carry a stranger's text: exceptions as type, reason and frames, libraries' messages as literals."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import Any, TextIO, cast

import grpc
import orjson
import structlog
from opentelemetry import trace
from structlog.typing import FilteringBoundLogger

REASON = re.compile(r"[A-Z][A-Z0-9_]{1,63}")
_SQLSTATE = re.compile(r"[0-9A-Z]{5}")
_LOGGER_NAME = re.compile(r"[A-Za-z_][\w.]{0,100}")
_FRAMES = 25
_CAUSES = 4
_REPEAT_WINDOW = 5.0
_WITHHELD = "message withheld: not a literal of the code that logged it"
_JSON = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z


def type_name(value: object) -> str:
    """The type's qualified name, without the module for builtins."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def status_code_of(error: BaseException) -> grpc.StatusCode | None:
    """The gRPC status an exception carries: our own problems as an attribute, gRPC's as a method."""
    code = getattr(error, "code", None)
    if callable(code):
        with suppress(Exception):
            code = code()
    return code if isinstance(code, grpc.StatusCode) else None


def describe_exception(error: BaseException, depth: int = _CAUSES) -> dict[str, Any]:
    """Type, our own `reason`, gRPC status, SQLSTATE, frames and causes; never a message, an argument or a local."""
    told: dict[str, Any] = {"type": type_name(error)}
    reason = getattr(error, "reason", None)
    if isinstance(reason, str) and REASON.fullmatch(reason):
        told["reason"] = reason
    if code := status_code_of(error):
        told["code"] = code.name
    sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None)
    if isinstance(sqlstate, str) and _SQLSTATE.fullmatch(sqlstate):
        told["sqlstate"] = sqlstate
    if frames := [f"{_short(file)}:{line} {name}" for file, line, name in _walk(error.__traceback__)]:
        told["frames"] = frames[-_FRAMES:]
    if isinstance(error, BaseExceptionGroup):
        told["parts"] = [type_name(part) for part in error.exceptions[:10]]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth > 1:
        told["cause"] = describe_exception(cause, depth - 1)
    return told


def _walk(traceback: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        yield code.co_filename, traceback.tb_lineno, code.co_qualname
        traceback = traceback.tb_next


def _short(path: str) -> str:
    return "/".join(path.replace("\\", "/").rsplit("/", 3)[-3:])


def _stranger(value: object) -> Any:
    """What JSON does not know is named, never shown: a row's or a message's repr holds its values."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, set | frozenset):
        return sorted(item for item in value if isinstance(item, str))
    return f"<{type_name(value)}>"


def to_line(event: MutableMapping[str, Any]) -> str:
    """One JSON object without a line break; never raises."""
    try:
        return orjson.dumps(event, default=_stranger, option=_JSON).decode()
    except (TypeError, ValueError, RecursionError):  # a lone surrogate, an integer beyond 64 bits, a circle
        with suppress(TypeError, ValueError, RecursionError):
            return json.dumps(event, default=_stranger, skipkeys=True)
        return json.dumps({"event": "log line could not be written", "level": "error", "time": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _trace_ids() -> dict[str, str]:
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


class _Lines(structlog.WriteLogger):
    """Writes lines; a reader that went away must not fail the request that logs."""

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def _place(_: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event.update(time=_now(), level="error" if level == "exception" else level, **_trace_ids())
    return event


def _exception(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exception()
    if isinstance(error, BaseException):
        event["exception"] = describe_exception(error)
    return event


def _render(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    return to_line(event)


def json_logger(stream: TextIO | None = None, level: str = "info", **bound: str) -> FilteringBoundLogger:
    """A logger of its own, configured nowhere else: one JSON object a line, with UTC time and the current span's ids."""
    logger = structlog.wrap_logger(
        _Lines(stream or sys.stdout),
        processors=[_place, _exception, _render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    return cast(FilteringBoundLogger, logger.bind(**bound))


class LogGuard(logging.Handler):
    """The only handler of the standard library's root logger while it is installed.

    A library's message leaves only if it is a literal in the code that logged it, with its arguments dropped: `logger.error(f"bad
    {value}")` and asyncio's joined lines hold values in the message itself. Everything else keeps logger, level, place, exception.
    """

    def __init__(self, stream: TextIO, service: str) -> None:
        super().__init__()
        self._lines = _Lines(stream)
        self._service = service
        self._seen: dict[tuple[str, str, int], tuple[float, int]] = {}
        self._undo: list[Callable[[], None]] = []

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a log call must never fail the code that makes it, nor print what it was given
            if (repeated := self._repeated(record)) is not None:
                self._lines.msg(to_line(self._event(record) | ({"repeated": repeated} if repeated else {})))

    def _event(self, record: logging.LogRecord) -> dict[str, Any]:
        event = {
            "event": record.msg if _is_literal(record) else _WITHHELD,
            "time": _now(),
            "level": record.levelname.lower(),
            "logger": record.name if _LOGGER_NAME.fullmatch(record.name) else "other",
            "where": f"{_short(record.pathname)}:{record.lineno} {record.funcName}",
        } | _trace_ids()
        if self._service:
            event["service"] = self._service
        args = record.args.values() if isinstance(record.args, dict) else record.args or ()
        if named := [type_name(arg) for arg in (record.msg, *args) if isinstance(arg, BaseException)]:
            event["errors"] = named
        if record.exc_info and record.exc_info[1] is not None:
            event["exception"] = describe_exception(record.exc_info[1])
        return event

    def _repeated(self, record: logging.LogRecord) -> int | None:
        """None to be silent (a client without its broker logs a line per failed try), else how many lines were kept back."""
        place, now = (record.name, record.pathname, record.lineno), time.monotonic()
        since, kept = self._seen.get(place, (now - _REPEAT_WINDOW, 0))
        if now - since < _REPEAT_WINDOW:
            self._seen[place] = since, kept + 1
            return None
        self._seen[place] = now, 0
        return kept

    def uncaught(self, origin: str, error: BaseException | None) -> None:
        """Writes what the interpreter would have printed to stderr with its message."""
        event = {"event": "uncaught exception", "time": _now(), "level": "critical", "logger": origin} | _trace_ids()
        if self._service:
            event["service"] = self._service
        self._lines.msg(to_line(event | ({"exception": describe_exception(error)} if error else {})))

    def remove(self) -> None:
        """Puts everything back as it was (for tests)."""
        while self._undo:
            self._undo.pop()()


def _is_literal(record: logging.LogRecord) -> bool:
    if not isinstance(record.msg, str):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame and not (frame.f_code.co_filename == record.pathname and frame.f_lineno == record.lineno):
        frame = frame.f_back
    if frame is None:
        return False
    code = frame.f_code
    return record.msg in code.co_consts or any(frame.f_globals.get(name) is record.msg for name in code.co_names)


def install_log_guard(stream: TextIO | None = None, *, service: str = "", level: int = logging.WARNING) -> LogGuard:
    """Routes the standard library's logging and uncaught exceptions of this process into safe JSON lines.

    Call it once per process, after libraries that configure logging at import; a second call returns the guard that stands. Servers that
    bring their own logging configuration (uvicorn) must be told not to (`log_config=None`). Below WARNING SQLAlchemy echoes statements.
    """
    root = logging.getLogger()
    for handler in root.handlers:
        if isinstance(handler, LogGuard):
            return handler
    guard = LogGuard(stream or sys.stdout, service)
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    for logger in loggers:
        guard._undo.append(_restore(logger, logger.handlers[:], logger.propagate, logger.level))
        logger.handlers[:] = []
        logger.propagate = True
    root.addHandler(guard)
    root.setLevel(level)

    raising, hooks = logging.raiseExceptions, (sys.excepthook, threading.excepthook, sys.unraisablehook)
    logging.raiseExceptions = False  # else a failing handler prints the record's arguments
    logging.captureWarnings(True)
    sys.excepthook = lambda _, error, __: guard.uncaught("main", error)
    threading.excepthook = lambda args: guard.uncaught("thread", args.exc_value)
    sys.unraisablehook = lambda args: guard.uncaught("finalizer", args.exc_value)

    def restore_hooks() -> None:
        logging.captureWarnings(False)
        logging.raiseExceptions = raising
        sys.excepthook, threading.excepthook, sys.unraisablehook = hooks

    guard._undo.append(restore_hooks)
    return guard


def _restore(
    logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int
) -> Callable[[], None]:
    def undo() -> None:
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)

    return undo
