"""Reminders and messages over gRPC."""

from care.notifications.v1 import notifications_pb2 as pb
from care.notifications.v1.notifications_pb2_grpc import MessagesServiceServicer, RemindersServiceServicer

from chassis.call import Call
from chassis.reading import Rows
from chassis.wire import enum_names, to_proto
from services.notifications.message import Message, Reminder


class RemindersServicer(RemindersServiceServicer):
    """The ledger."""

    async def ListReminders(self, request: pb.ListRemindersRequest, call: Call) -> pb.ListRemindersResponse:
        wanted = (
            Rows(Reminder)
            .given(Reminder.appointment_id, request.appointment_id)
            .given(Reminder.patient_id, request.patient_id)
            .among(Reminder.status, enum_names(pb.Reminder.Status, request.statuses))
        )
        rows, following = await call.page(wanted, request, Reminder.due_time, Reminder.id)
        return pb.ListRemindersResponse(
            reminders=[to_proto(row, pb.Reminder) for row in rows], next_page_token=following
        )


class MessagesServicer(MessagesServiceServicer):
    """What left, what waits, what didn't leave and why."""

    async def GetMessage(self, request: pb.GetMessageRequest, call: Call) -> pb.Message:
        return to_proto(await call.get(Message, request.id), pb.Message)

    async def ListMessages(self, request: pb.ListMessagesRequest, call: Call) -> pb.ListMessagesResponse:
        wanted = (
            Rows(Message)
            .among(Message.patient_id, request.patient_ids)
            .among(Message.status, enum_names(pb.Message.Status, request.statuses))
        )
        rows, following = await call.page(wanted, request, Message.create_time, Message.id, descending=True)
        return pb.ListMessagesResponse(messages=[to_proto(row, pb.Message) for row in rows], next_page_token=following)
