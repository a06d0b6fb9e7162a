"""What every service shares and no word of the domain: request, telling, consuming, identity, telemetry."""

import os

# gRPC's handlers of fork() run in the child too and abort it now and then while other threads call into gRPC, so that a server
# started beside a busy one dies before its exec (grpc/grpc, doc/fork_support.md: off where exec always follows, as it does here).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
