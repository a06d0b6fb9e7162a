"""The timeline and the contacts over gRPC."""

from care.patients.v1.timeline_pb2_grpc import ContactsServiceServicer, TimelineServiceServicer


class TimelineServicer(TimelineServiceServicer):
    """Under construction."""


class ContactsServicer(ContactsServiceServicer):
    """Under construction."""
