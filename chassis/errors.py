"""Every error that leaves a service: one code, one published reason, one plain sentence, never a patient's value."""

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

DOMAIN = "care"
_BY_NUMBER = {code.value[0]: code for code in StatusCode}


class Problem(Exception):
    """What a caller is told.

    `reason` is UPPER_SNAKE and published in the service's README; `message` is one sentence that says what to do;
    every dynamic part of it stands in `metadata` too. Neither ever holds a patient's value or a driver's text.
    """

    code: StatusCode = StatusCode.UNKNOWN

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.message = message
        self.metadata = {name: str(value) for name, value in metadata.items()}


class Invalid(Problem):
    """The request is wrong by itself, whatever the state of the system."""

    code = StatusCode.INVALID_ARGUMENT


class Unauthenticated(Problem):
    """Nobody knows who calls."""

    code = StatusCode.UNAUTHENTICATED


class PermissionDenied(Problem):
    """The caller's roles don't allow the RPC. An object out of sight is `NotFound` instead."""

    code = StatusCode.PERMISSION_DENIED


class NotFound(Problem):
    """Absent, or not the caller's to see: the answer is the same."""

    code = StatusCode.NOT_FOUND

    def __init__(
        self,
        reason: str = "NOT_FOUND",
        message: str = "There is no such resource, or it isn't yours to see.",
        **more: str,
    ) -> None:
        super().__init__(reason, message, **more)


class AlreadyExists(Problem):
    """Something that may exist once only is there already."""

    code = StatusCode.ALREADY_EXISTS


class FailedPrecondition(Problem):
    """The state of the system doesn't allow it now."""

    code = StatusCode.FAILED_PRECONDITION


class Aborted(Problem):
    """Somebody else was faster; read again."""

    code = StatusCode.ABORTED


class ResourceExhausted(Problem):
    """Too much at once; later."""

    code = StatusCode.RESOURCE_EXHAUSTED


class Unavailable(Problem):
    """Something that is needed is away; later."""

    code = StatusCode.UNAVAILABLE


class DeadlineExceeded(Problem):
    """The caller's deadline is over."""

    code = StatusCode.DEADLINE_EXCEEDED


class Unimplemented(Problem):
    """There is no such RPC."""

    code = StatusCode.UNIMPLEMENTED


class Internal(Problem):
    """A defect of ours."""

    code = StatusCode.INTERNAL

    def __init__(self) -> None:
        super().__init__("INTERNAL", "This is a defect of the service; its log holds the trace id.")


class LostRace(Exception):
    """Somebody else was faster, but a new transaction may find another way: it is tried anew, then `problem` is told."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


_CLASSES: dict[StatusCode, type[Problem]] = {
    cls.code: cls
    for cls in (
        Invalid,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        Aborted,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Unimplemented,
        Internal,
    )
}


def to_status(problem: Problem) -> status_pb2.Status:
    """`google.rpc.Status` with one `ErrorInfo`."""
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=problem.reason, domain=DOMAIN, metadata=problem.metadata))
    return status_pb2.Status(code=problem.code.value[0], message=problem.message, details=[detail])


def problem_from_status(status: status_pb2.Status) -> Problem:
    """The problem that another service told. A status without `ErrorInfo` did not come from a service of ours."""
    code = _BY_NUMBER.get(status.code, StatusCode.UNKNOWN)
    for detail in status.details:
        found = error_details_pb2.ErrorInfo()
        if detail.Unpack(found):
            return _problem(code, found.reason, status.message, dict(found.metadata))
    return _foreign(code)


def problem_from_rpc(error: grpc.RpcError) -> Problem:
    """The problem behind a failed call of ours."""
    trailers = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    for key, value in trailers or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            return problem_from_status(status_pb2.Status.FromString(value))
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else StatusCode.UNKNOWN
    return _foreign(code)


def _foreign(code: StatusCode) -> Problem:
    # grpc's own text may quote an address or a value: it stays behind.
    if code in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED):
        return Unavailable("SERVICE_UNAVAILABLE", "A service that is needed does not answer; try again.")
    if code is StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("DEADLINE_EXCEEDED", "The answer did not come in time; try again.")
    if code is StatusCode.UNIMPLEMENTED:
        return Unimplemented("UNIMPLEMENTED", "There is no such RPC.")
    if code is StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted("TOO_LARGE", "The message is larger than the limit.")
    return Internal()


def _problem(code: StatusCode, reason: str, message: str, metadata: dict[str, str]) -> Problem:
    problem = Problem(reason, message)
    problem.metadata = metadata  # not as keywords: another build may have any names
    cls = _CLASSES.get(code)
    if cls is not None:
        problem.__class__ = cls
    problem.code = code
    return problem
