"""Free slots over gRPC."""

import hashlib

from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1.appointments_pb2_grpc import AvailabilityServiceServicer

from chassis.call import Call
from chassis.errors import Invalid
from chassis.wire import to_proto, to_time
from services.scheduling import offers
from services.scheduling.availability import Slot
from services.scheduling.finding import Search, free_slots, wishes
from services.scheduling.offers import Place
from services.scheduling.servicer_appointments import offer_signer

_PAGE, _PAGE_AT_MOST = 50, 200


class AvailabilityServicer(AvailabilityServiceServicer):
    """What is free."""

    async def SearchAvailability(
        self, request: pb.SearchAvailabilityRequest, call: Call
    ) -> pb.SearchAvailabilityResponse:
        if request.patient_id:
            await call.subject(request.patient_id)
        after, end = _opened(request, call)
        if not end and request.HasField("end_time"):
            end = _seconds(request.end_time)
        search = Search(
            call.tenant_id,
            request.visit_type_id,
            list(request.clinic_ids),
            list(request.practitioner_ids),
            after.start if after else (_seconds(request.start_time) if request.HasField("start_time") else 0),
            end,
            request.patient_id,
            wishes(request.weekdays, request.earliest, request.latest),
        )
        size = min(max(request.page_size or _PAGE, 1), _PAGE_AT_MOST)
        free = await free_slots(call.db, search, size + 1, after)
        slots = free.slots
        signer = offer_signer(call)
        expires = free.now + int(call.runtime.settings.offer_lifetime)  # type: ignore[attr-defined]
        answer = pb.SearchAvailabilityResponse()
        for slot in slots[:size]:
            place = Place(request.visit_type_id, slot.clinic_id, slot.practitioner_id, slot.start, slot.resource_ids)
            found = to_proto(
                slot,
                pb.Slot,
                visit_type_id=request.visit_type_id,
                time_zone=free.zones[slot.clinic_id],
                offer_token=signer.sign(offers.written(call.tenant_id, place, expires)),
            )
            found.start_time.seconds, found.end_time.seconds = slot.start, slot.end
            answer.slots.append(found)
        if len(slots) > size:
            last = slots[size - 1]
            answer.next_page_token = call.runtime.page_signer.sign(
                [_shape(request), last.start, last.clinic_id, last.practitioner_id, free.end]
            )
        return answer


def _opened(request: pb.SearchAvailabilityRequest, call: Call) -> tuple[Slot | None, int]:
    """The last slot of the page before and the end of its window; a page stays right while others book."""
    if not request.page_token:
        return None, 0
    opened = call.runtime.page_signer.open(request.page_token)
    if not isinstance(opened, list) or len(opened) != 5 or opened[0] != _shape(request):
        raise Invalid(
            "PAGE_TOKEN_INVALID", "The page token is not of this query; begin with the first page.", field="page_token"
        )
    _, start, clinic_id, practitioner_id, end = opened
    # After every slot of this start, place and person, whatever rooms they would take.
    return Slot(start, clinic_id, practitioner_id, 1 << 62, ()), end


def _shape(request: pb.SearchAvailabilityRequest) -> str:
    bare = pb.SearchAvailabilityRequest()
    bare.CopyFrom(request)
    bare.ClearField("page_token")
    bare.ClearField("page_size")
    return hashlib.blake2b(bare.SerializeToString(deterministic=True), digest_size=8).hexdigest()


def _seconds(stamp: object) -> int:
    """A start falls on whole seconds: what is asked for within one begins with the next."""
    return -int(-to_time(stamp).timestamp() // 1)  # type: ignore[arg-type]
