"""Reminders and messages over gRPC."""

from care.notifications.v1 import notifications_pb2 as pb
from care.notifications.v1.notifications_pb2_grpc import MessagesServiceServicer, RemindersServiceServicer

from chassis.call import Call
from chassis.wire import enum_names, to_proto
from services.notifications.message import Message, Reminder


class RemindersServicer(RemindersServiceServicer):
    """The ledger."""

    async def ListReminders(self, request: pb.ListRemindersRequest, call: Call) -> pb.ListRemindersResponse:
        query = call.select(Reminder)
        if request.appointment_id:
            query = query.where(Reminder.appointment_id == request.appointment_id)
        if request.patient_id:
            query = query.where(Reminder.patient_id == request.patient_id)
        if request.statuses:
            query = query.where(Reminder.status.in_(enum_names(pb.Reminder.Status, request.statuses)))
        rows, following = await call.page(query, request, Reminder.due_time, Reminder.id)
        return pb.ListRemindersResponse(
            reminders=[to_proto(row, pb.Reminder) for row in rows], next_page_token=following
        )


class MessagesServicer(MessagesServiceServicer):
    """What left, what waits, what didn't leave and why."""

    async def GetMessage(self, request: pb.GetMessageRequest, call: Call) -> pb.Message:
        return to_proto(await call.get(Message, request.id), pb.Message)

    async def ListMessages(self, request: pb.ListMessagesRequest, call: Call) -> pb.ListMessagesResponse:
        query = call.select(Message)
        if request.patient_ids:
            query = query.where(Message.patient_id.in_(list(request.patient_ids)))
        if request.statuses:
            query = query.where(Message.status.in_(enum_names(pb.Message.Status, request.statuses)))
        rows, following = await call.page(query, request, Message.create_time, Message.id, descending=True)
        return pb.ListMessagesResponse(messages=[to_proto(row, pb.Message) for row in rows], next_page_token=following)
