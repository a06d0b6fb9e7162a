"""The timeline and the contacts over gRPC."""

from datetime import timedelta

from care.patients.v1 import timeline_pb2 as pb
from care.patients.v1.timeline_pb2_grpc import ContactsServiceServicer, TimelineServiceServicer

from chassis.call import Call
from chassis.errors import Invalid
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, given, to_proto
from services.patients.contact import Contact
from services.patients.labels import labels_of
from services.patients.task import Task
from services.patients.timeline import TimelineEntry

_CLOCKS_DIFFER = timedelta(minutes=5)


class TimelineServicer(TimelineServiceServicer):
    """What happened to a patient."""

    async def ListTimelineEntries(
        self, request: pb.ListTimelineEntriesRequest, call: Call
    ) -> pb.ListTimelineEntriesResponse:
        await call.subject(request.patient_id)
        wanted = (
            Rows(TimelineEntry)
            .equal(TimelineEntry.patient_id, request.patient_id)
            .among(TimelineEntry.type, request.types)
        )
        rows, following = await call.page(wanted, request, TimelineEntry.time, TimelineEntry.id, descending=True)
        return pb.ListTimelineEntriesResponse(
            entries=[to_proto(row, pb.TimelineEntry) for row in rows], next_page_token=following
        )


class ContactsServicer(ContactsServiceServicer):
    """Contacts and attempts."""

    async def CreateContact(self, request: pb.CreateContactRequest, call: Call) -> pb.Contact:
        values = given(request.contact, read_only=OUTPUT_ONLY | {"recorder", "security_labels"})
        await call.subject(values["patient_id"])
        took_place = values.pop("contact_time", call.now)
        if took_place > call.now + _CLOCKS_DIFFER:
            raise Invalid("CONTACT_TIME_AHEAD", "A contact can't lie ahead.", field="contact.contact_time")
        referral_id = values.get("referral_id", "")
        labels = set(await labels_of(call.db, call.tenant_id, values["patient_id"], source_id=referral_id))
        if "task_id" in values:
            query = call.select(Task).where(Task.id == values["task_id"], Task.patient_id == values["patient_id"])
            task = (await call.db.execute(query)).scalar_one_or_none()
            if task is None:
                raise Invalid("TASK_UNKNOWN", "This patient has no such task.", field="contact.task_id")
            labels.update(task.security_labels)
        contact = Contact(
            id=new_id(), contact_time=took_place, recorder=call.actor, security_labels=sorted(labels), **values
        )
        contact.tell("recorded")
        await call.add(contact)
        await call.db.flush()
        return to_proto(contact, pb.Contact)

    async def ListContacts(self, request: pb.ListContactsRequest, call: Call) -> pb.ListContactsResponse:
        await call.subject(request.patient_id)
        wanted = (
            Rows(Contact)
            .equal(Contact.patient_id, request.patient_id)
            .given(Contact.task_id, request.task_id)
            .given(Contact.referral_id, request.referral_id)
        )
        rows, following = await call.page(wanted, request, Contact.contact_time, Contact.id, descending=True)
        return pb.ListContactsResponse(contacts=[to_proto(row, pb.Contact) for row in rows], next_page_token=following)
