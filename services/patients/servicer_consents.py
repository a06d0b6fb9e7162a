"""ConsentsServicer over gRPC."""

from care.patients.v1.consents_pb2_grpc import ConsentsServiceServicer


class ConsentsServicer(ConsentsServiceServicer):
    """Under construction."""
