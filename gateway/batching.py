"""Reads of several callers joined into one RPC per service, which halves what a summary costs under load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

import grpc
from care.batch.v1 import batch_pb2
from google.protobuf.message import Message
from google.rpc import status_pb2
from prometheus_client import Histogram

from chassis.clients import Clients
from chassis.errors import Internal, Problem, problem_from_rpc, problem_from_status
from chassis.telemetry import Telemetry, current_traceparent

_METHOD: Final = "/care.batch.v1.BatchService/BatchRead"
_MOST_ITEMS: Final = 64
Call = Callable[..., Awaitable[Any]]


class Reads(Protocol):
    """One read of a service with a caller's own token."""

    async def read(self, service: str, method: str, request: Message, token: str, timeout: float) -> bytes:
        """The serialized answer of `method` ("care.x.v1.Service/Verb"). Raises Problem; TimeoutError after `timeout` seconds."""
        ...


class PlainReads:
    """One RPC per read."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._calls: dict[tuple[str, str], Call] = {}

    async def read(self, service: str, method: str, request: Message, token: str, timeout: float) -> bytes:
        call = self._calls.get((service, method))
        if call is None:
            call = cast(Call, self._clients.channel(service).unary_unary(f"/{method}"))
            self._calls[service, method] = call
        try:
            return await call(  # type: ignore[no-any-return]
                request.SerializeToString(), timeout=timeout, metadata=(("authorization", f"Bearer {token}"),)
            )
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from error


@dataclass(slots=True)
class _Waiting:
    item: Any
    answer: asyncio.Future[bytes]
    timeout: float
    context: Context


@dataclass(slots=True)
class _Line:
    """What waits for one service."""

    call: Call
    waiting: list[_Waiting] = field(default_factory=list)
    under_way: int = 0
    wake_up: asyncio.Handle | None = None


class BatchedReads:
    """Joins reads to the same service: at once while few batches are under way, else as soon as one is back.

    A read that comes alone leaves in the same turn of the loop, as a batch of its own; under load batches grow by
    themselves. `patience` seconds bound how long a read waits behind slow batches.
    """

    def __init__(self, clients: Clients, telemetry: Telemetry, *, under_way: int = 2, patience: float = 0.005) -> None:
        self._clients = clients
        self._under_way = under_way
        self._patience = patience
        self._lines: dict[str, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sizes = Histogram(
            "gateway_batch_items",
            "Reads per batch.",
            ("care_service",),
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=telemetry.registry,
        )

    async def read(self, service: str, method: str, request: Message, token: str, timeout: float) -> bytes:
        line = self._lines.get(service)
        if line is None:
            call = self._clients.channel(service).unary_unary(
                _METHOD,
                request_serializer=batch_pb2.BatchReadRequest.SerializeToString,
                response_deserializer=batch_pb2.BatchReadResponse.FromString,
            )
            line = self._lines[service] = _Line(cast(Call, call))
        loop = asyncio.get_running_loop()
        one = _Waiting(
            batch_pb2.BatchReadRequest.Item(
                method=method, request=request.SerializeToString(), token=token, traceparent=current_traceparent()
            ),
            loop.create_future(),
            timeout,
            copy_context(),
        )
        line.waiting.append(one)
        if line.under_way < self._under_way or len(line.waiting) >= _MOST_ITEMS:
            # Not this instant: a summary's legs to one service are asked for in the same turn of the loop.
            if line.wake_up is None or isinstance(line.wake_up, asyncio.TimerHandle):
                self._wake(line, loop.call_soon(self._send, service, line))
        elif line.wake_up is None:
            self._wake(line, loop.call_later(self._patience, self._send, service, line))
        async with asyncio.timeout(timeout):
            return await one.answer

    @staticmethod
    def _wake(line: _Line, handle: asyncio.Handle | None) -> None:
        if line.wake_up is not None:
            line.wake_up.cancel()
        line.wake_up = handle

    def _send(self, service: str, line: _Line) -> None:
        self._wake(line, None)
        while line.waiting:
            batch, line.waiting = line.waiting[:_MOST_ITEMS], line.waiting[_MOST_ITEMS:]
            batch = [one for one in batch if not one.answer.done()]  # who gave up meanwhile isn't asked for
            if batch:
                line.under_way += 1
                # The RPC's span belongs to the first caller's trace; each item brings its own traceparent.
                exchange = self._exchange(service, line, batch)
                task = asyncio.get_running_loop().create_task(exchange, context=batch[0].context)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _exchange(self, service: str, line: _Line, batch: list[_Waiting]) -> None:
        self._sizes.labels(service).observe(len(batch))
        try:
            answer = await line.call(
                batch_pb2.BatchReadRequest(items=[one.item for one in batch]),
                timeout=max(one.timeout for one in batch),
                metadata=self._clients.own_metadata(),
            )
            results: list[Any] = list(answer.results)
            if len(results) != len(batch):
                raise Internal
        except Exception as error:
            problem = _problem(error)
            for one in batch:
                if not one.answer.done():
                    # One object each: a raised exception collects a traceback.
                    one.answer.set_exception(_copy(problem))
            return
        finally:
            line.under_way -= 1
            if line.waiting:
                self._send(service, line)
        for one, result in zip(batch, results, strict=True):
            if one.answer.done():
                continue
            if result.code:
                one.answer.set_exception(problem_from_status(status_pb2.Status.FromString(result.status)))
            else:
                one.answer.set_result(result.response)


def _problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    return problem_from_rpc(error) if isinstance(error, grpc.RpcError) else Internal()


def _copy(problem: Problem) -> Problem:
    copy = Problem(problem.reason, problem.message, **problem.metadata)
    copy.__class__ = problem.__class__
    copy.code = problem.code
    return copy
