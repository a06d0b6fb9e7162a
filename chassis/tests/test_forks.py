"""A process that serves gRPC may start others."""

import subprocess
import sys

_BUSY_AND_STARTING = """
import chassis
import asyncio, os, subprocess, grpc

class Echo(grpc.GenericRpcHandler):
    def service(self, _):
        async def echo(request, _):
            return request
        return grpc.unary_unary_rpc_method_handler(echo)

async def call(channel):
    echo = channel.unary_unary("/test.Echo/Echo")
    while True:
        await echo(b"x")

async def main():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # A channel of its own each: else they share one connection.
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("test.own", n)]) for n in range(4)]
    calls = [asyncio.create_task(call(channel)) for channel in channels for _ in range(2)]
    await asyncio.sleep(0.2)
    # `user` makes it a fork() instead of a vfork(), which runs no handlers.
    ends = [await asyncio.to_thread(lambda: subprocess.run(["true"], user=os.getuid()).returncode) for _ in range(40)]
    print(ends.count(0), flush=True)
    os._exit(0)

asyncio.run(main())
"""


def test_a_process_started_beside_busy_grpc_calls_lives_to_its_exec():
    ran = subprocess.run([sys.executable, "-c", _BUSY_AND_STARTING], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["40"], ran.stderr[-2000:]
