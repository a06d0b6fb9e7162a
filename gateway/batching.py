"""Reads of several callers joined into one RPC per service, which halves what a summary costs under load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import Context, copy_context
from dataclasses import dataclass
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
_MOST_WAITING: Final = 256
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
    service: str
    item: Any
    answer: asyncio.Future[bytes]
    timeout: float
    context: Context


class BatchedReads:
    """Joins reads of all callers in rounds: one RPC per service with what has come meanwhile.

    While few rounds are under way the next one leaves in the same turn of the loop, so a read that comes alone waits for
    nobody; under load rounds grow by themselves. They are common to all services: a summary is as late as its last leg, and
    small batches to the quick services would only cost RPCs. `patience` seconds bound how long a read waits behind a slow round.
    """

    def __init__(self, clients: Clients, telemetry: Telemetry, *, under_way: int = 2, patience: float = 0.05) -> None:
        self._clients = clients
        self._at_once = under_way
        self._patience = patience
        self._calls: dict[str, Call] = {}
        self._waiting: list[_Waiting] = []
        self._rounds = 0
        self._wake_up: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._sizes = Histogram(
            "gateway_batch_items",
            "Reads per batch.",
            ("care_service",),
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=telemetry.registry,
        )

    async def read(self, service: str, method: str, request: Message, token: str, timeout: float) -> bytes:
        self._call(service)  # an unknown one is told now
        loop = asyncio.get_running_loop()
        one = _Waiting(
            service,
            batch_pb2.BatchReadRequest.Item(
                method=method, request=request.SerializeToString(), token=token, traceparent=current_traceparent()
            ),
            loop.create_future(),
            timeout,
            copy_context(),
        )
        self._waiting.append(one)
        if self._rounds < self._at_once or len(self._waiting) >= _MOST_WAITING:
            # Not this instant: a summary's legs are asked for in the same turn of the loop.
            if self._wake_up is None or isinstance(self._wake_up, asyncio.TimerHandle):
                self._wake(loop.call_soon(self._send))
        elif self._wake_up is None:
            self._wake(loop.call_later(self._patience, self._send))
        async with asyncio.timeout(timeout):
            return await one.answer

    def _call(self, service: str) -> Call:
        call = self._calls.get(service)
        if call is None:
            made = self._clients.channel(service).unary_unary(
                _METHOD,
                request_serializer=batch_pb2.BatchReadRequest.SerializeToString,
                response_deserializer=batch_pb2.BatchReadResponse.FromString,
            )
            call = self._calls[service] = cast(Call, made)
        return call

    def _wake(self, handle: asyncio.Handle | None) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
        self._wake_up = handle

    def _send(self) -> None:
        self._wake(None)
        lines: dict[str, list[_Waiting]] = {}
        for one in self._waiting:
            if not one.answer.done():  # who gave up meanwhile isn't asked for
                lines.setdefault(one.service, []).append(one)
        self._waiting = []
        if lines:
            self._rounds += 1
            self._start(self._round(lines), Context())

    async def _round(self, lines: Mapping[str, list[_Waiting]]) -> None:
        exchanges = []
        for service, line in lines.items():
            for first in range(0, len(line), _MOST_ITEMS):
                batch = line[first : first + _MOST_ITEMS]
                # The RPC's span belongs to the first caller's trace; each item brings its own traceparent.
                exchanges.append(self._start(self._exchange(service, batch), batch[0].context))
        await asyncio.wait(exchanges)
        self._rounds -= 1
        if self._waiting:
            self._send()

    def _start(self, work: Coroutine[Any, Any, None], context: Context) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _exchange(self, service: str, batch: list[_Waiting]) -> None:
        self._sizes.labels(service).observe(len(batch))
        try:
            answer = await self._call(service)(
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
