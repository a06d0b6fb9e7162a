"""Several callers' reads in one RPC, each through all the stages by itself."""

import asyncio

from care.batch.v1 import batch_pb2

from chassis.call import Call
from chassis.pipeline import Credentials, Pipeline


class BatchServicer:
    """Runs the reads of a batch side by side."""

    pipeline: Pipeline

    async def BatchRead(self, request: batch_pb2.BatchReadRequest, call: Call) -> batch_pb2.BatchReadResponse:
        results = await asyncio.gather(
            *(
                self.pipeline.batched(
                    item.method, item.request, Credentials(token=item.token), item.traceparent, call.notes
                )
                for item in request.items
            )
        )
        answer = batch_pb2.BatchReadResponse()
        for code, body in results:
            if code:
                answer.results.add(code=code, status=body)
            else:
                answer.results.add(response=body)
        return answer
