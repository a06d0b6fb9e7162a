"""TasksServicer over gRPC."""

from care.patients.v1.tasks_pb2_grpc import TasksServiceServicer


class TasksServicer(TasksServiceServicer):
    """Under construction."""
