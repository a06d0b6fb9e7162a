"""`python -m bench.grpc_load FILE`: load on a gRPC service, out of a process of its own so that its CPU isn't the service's.

FILE is a pickled `Job`. Says `GO` after the warm-up and answers one line of JSON; messages go as bytes, so that a call costs
the client little.
"""

import asyncio
import itertools
import json
import pickle
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import grpc
import uvloop
from google.rpc import error_details_pb2, status_pb2


@dataclass
class Job:
    """What is to be sent: `requests` are (token, message) in turn, again from the first where `again` is set."""

    target: str
    method: str
    requests: list[tuple[str, bytes]]
    seconds: float
    warm_up: float
    connections: int = 16
    again: bool = True
    rivals: int = 1
    """So many in a row are sent at the same moment, and the next ones when all are answered."""


@dataclass
class Measured:
    """What one run has measured; latencies in milliseconds."""

    won: int
    lost: int
    wrong: int
    seconds: float
    p50: float
    p99: float
    lost_p50: float
    lost_p99: float
    cpu: float
    """Seconds that this process has used."""
    reasons: dict[str, int] = field(default_factory=dict)


class _Load:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._next = itertools.cycle(job.requests) if job.again else iter(job.requests)
        self.won: list[float] = []
        self.lost: list[float] = []
        self.wrong: Counter[str] = Counter()

    async def run(self) -> Measured:
        job = self._job
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", -1),
        ]
        channels = [grpc.aio.insecure_channel(job.target, options=options) for _ in range(min(4, job.connections))]
        calls = [channel.unary_unary(job.method) for channel in channels]
        lines = [calls[number % len(calls)] for number in range(job.connections)]
        await self._work(lines, job.warm_up)
        self.won.clear(), self.lost.clear(), self.wrong.clear()
        print("GO", flush=True)
        used, began = time.process_time(), time.perf_counter()
        await self._work(lines, job.seconds)
        took = time.perf_counter() - began
        used = time.process_time() - used
        for channel in channels:
            await channel.close()
        return Measured(
            len(self.won),
            len(self.lost),
            sum(self.wrong.values()),
            took,
            *_percentiles(self.won),
            *_percentiles(self.lost),
            used,
            dict(self.wrong),
        )

    async def _work(self, lines: list[grpc.aio.UnaryUnaryMultiCallable], seconds: float) -> None:
        until = time.perf_counter() + seconds
        rivals = self._job.rivals

        async def alone(call: grpc.aio.UnaryUnaryMultiCallable) -> None:
            while time.perf_counter() < until:
                await self._one(call, *next(self._next))

        if rivals == 1:
            await asyncio.gather(*map(alone, lines))
            return
        while time.perf_counter() < until:
            together = list(itertools.islice(self._next, rivals))
            await asyncio.gather(*(self._one(call, *one) for call, one in zip(lines, together, strict=True)))

    async def _one(self, call: grpc.aio.UnaryUnaryMultiCallable, token: str, message: bytes) -> None:
        began = time.perf_counter()
        try:
            answer = await call(message, metadata=(("authorization", token),), timeout=20)
        except grpc.aio.AioRpcError as error:
            took = (time.perf_counter() - began) * 1000
            reason = _reason(error)
            if reason == "SLOT_TAKEN":
                self.lost.append(took)
            else:
                self.wrong[reason] += 1
            return
        took = (time.perf_counter() - began) * 1000
        if answer:
            self.won.append(took)
        else:
            self.wrong["EMPTY"] += 1


def _reason(error: grpc.aio.AioRpcError) -> str:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return str(error.code().name)


def _percentiles(milliseconds: list[float]) -> tuple[float, float]:
    if len(milliseconds) < 2:
        return (milliseconds or [0.0])[0], (milliseconds or [0.0])[0]
    cuts = quantiles(milliseconds, n=100, method="inclusive")
    return cuts[49], cuts[98]


if __name__ == "__main__":
    given: Job = pickle.loads(Path(sys.argv[1]).read_bytes())
    print(json.dumps(vars(uvloop.run(_Load(given).run()))), flush=True)
