"""The request queue and patients' wishes over gRPC."""

from typing import Any

from care.scheduling.v1 import requests_pb2 as pb
from care.scheduling.v1.requests_pb2_grpc import (
    SchedulingPreferencesServiceServicer,
    SchedulingRequestsServiceServicer,
)
from sqlalchemy import func, select

from chassis.call import Call, require_etag
from chassis.errors import Aborted, FailedPrecondition, Invalid, PermissionDenied
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, etag_of, given, given_time, plain, to_proto
from services.scheduling.appointment import Appointment
from services.scheduling.directory import Clinic, Practitioner, VisitType
from services.scheduling.pools import Pool, pool_for
from services.scheduling.scheduling_request import (
    LIVE,
    SchedulingPreferences,
    SchedulingRequest,
    calendar_of,
)

_READ_ONLY = OUTPUT_ONLY | {
    "status", "due_time", "due_basis", "next_action", "attempts", "letter_time", "appointment_id", "close_reason",
    "security_labels", "history",
}  # fmt: skip
_FIXED = ("patient_id", "origin", "based_on")
_WORKED_ON = SchedulingRequest.due_time.is_not(None)


class SchedulingRequestsServicer(SchedulingRequestsServiceServicer):
    """Visits that somebody must make."""

    async def CreateSchedulingRequest(
        self, request: pb.CreateSchedulingRequestRequest, call: Call
    ) -> pb.SchedulingRequest:
        values = given(request.scheduling_request, read_only=_READ_ONLY)
        if not values.get("patient_id"):
            raise Invalid("PATIENT_MISSING", "A request needs patient_id.", field="scheduling_request.patient_id")
        if not values.get("clinic_id"):
            raise Invalid("CLINIC_MISSING", "A request needs clinic_id.", field="scheduling_request.clinic_id")
        await call.subject(values["patient_id"])
        based_on = values.get("based_on")
        if based_on is not None and based_on["type"] != "Referral":
            raise Invalid("BASED_ON_UNKNOWN", "A request is based on a Referral.", field="scheduling_request.based_on")
        labels = await _know(call, values)
        by_patient = call.caller.kind in ("patient", "related")
        if by_patient and values.get("priority") == "STAT":
            raise PermissionDenied(
                "PRIORITY_REFUSED", "Only staff say that a visit can't wait; in an emergency call 911."
            )
        owner = values.pop("owner", None)
        if owner is not None and not by_patient:  # who works on it is for staff to say
            await _know_owner(call, owner, "scheduling_request.owner")
        elif call.caller.kind == "staff":
            owner = {"type": "Staff", "id": call.caller.id}
        else:
            owner = {"type": "Pool", "id": await pool_for(call.db, call.tenant_id, values["clinic_id"])}
        if by_patient or values.get("origin") in (None, "ORIGIN_UNSPECIFIED"):
            values["origin"] = "PATIENT" if by_patient else "REFERRAL" if based_on else "STAFF"
        made = SchedulingRequest(id=new_id(), **values)
        made.referral_id = based_on["id"] if based_on is not None else None
        made.security_labels = labels
        made.open(owner, await calendar_of(call.db, call.tenant_id, made.clinic_id), call.now)
        await call.add(made)
        return await _answer(call, made)

    async def GetSchedulingRequest(self, request: pb.GetSchedulingRequestRequest, call: Call) -> pb.SchedulingRequest:
        return _shown(await call.get(SchedulingRequest, request.id), call)

    async def ListSchedulingRequests(
        self, request: pb.ListSchedulingRequestsRequest, call: Call
    ) -> pb.ListSchedulingRequestsResponse:
        wanted = (
            Rows(SchedulingRequest)
            .among(SchedulingRequest.patient_id, request.patient_ids)
            .among(SchedulingRequest.owner_id, request.owner_ids)
            .among(SchedulingRequest.clinic_id, request.clinic_ids)
            .among(SchedulingRequest.status, enum_names(pb.SchedulingRequest.Status, request.statuses))
            .before(SchedulingRequest.due_time, given_time(request, "due_before"))
        )
        if request.open:
            wanted.where(_WORKED_ON)
        rows, following = await call.page(
            wanted, request, SchedulingRequest.rank, SchedulingRequest.list_time, SchedulingRequest.id
        )
        return pb.ListSchedulingRequestsResponse(
            scheduling_requests=[_shown(row, call) for row in rows], next_page_token=following
        )

    async def UpdateSchedulingRequest(
        self, request: pb.UpdateSchedulingRequestRequest, call: Call
    ) -> pb.SchedulingRequest:
        row = await call.get(SchedulingRequest, request.scheduling_request.id, etag=require_etag(request.etag))
        values = given(request.scheduling_request, request.update_mask, read_only=_READ_ONLY)
        for fixed in _FIXED:
            if values.pop(fixed, getattr(row, fixed)) not in (
                "",
                None,
                f"{fixed.upper()}_UNSPECIFIED",
                getattr(row, fixed),
            ):
                raise Invalid("FIELD_FIXED", f"{fixed} can't be changed.", field=f"scheduling_request.{fixed}")
        if "clinic_id" in values and not values["clinic_id"]:
            raise Invalid("CLINIC_MISSING", "A request needs clinic_id.", field="scheduling_request.clinic_id")
        if values.get("owner") not in (None, row.owner):
            await _know_owner(call, values["owner"], "scheduling_request.owner")
        now = {name: getattr(row, name) for name in ("clinic_id", "visit_type_id", "earliest_date", "latest_date")}
        merged = {**now, **values}
        labels = await _know(call, merged)
        values = {name: merged[name] for name in values}
        if {"clinic_id", "visit_type_id"} & values.keys():
            values["security_labels"] = sorted({*row.security_labels, *labels})
        row.change(values, await calendar_of(call.db, call.tenant_id, merged["clinic_id"]))
        return await _answer(call, row)

    async def RecordAttempt(self, request: pb.RecordAttemptRequest, call: Call) -> pb.SchedulingRequest:
        row = await call.get(SchedulingRequest, request.id)
        row.attempt(
            pb.SchedulingRequest.Attempt.Outcome.Name(request.outcome),
            call.actor,
            await calendar_of(call.db, call.tenant_id, row.clinic_id),
            call.now,
            note=request.note,
            call_back=given_time(request, "call_back_time"),
        )
        return await _answer(call, row)

    async def RecordLetter(self, request: pb.RecordLetterRequest, call: Call) -> pb.SchedulingRequest:
        row = await call.get(SchedulingRequest, request.id)
        row.send_letter(await calendar_of(call.db, call.tenant_id, row.clinic_id), call.now)
        return await _answer(call, row)

    async def BookSchedulingRequest(self, request: pb.BookSchedulingRequestRequest, call: Call) -> pb.SchedulingRequest:
        # The visit's row is locked before the request's, as whoever cancels it does.
        visit = await call.get(Appointment, request.appointment_id)
        row = await call.get(SchedulingRequest, request.id)
        if visit.patient_id != row.patient_id:
            raise Invalid("PATIENT_DIFFERS", "The visit is another patient's.", field="appointment_id")
        if visit.status not in LIVE:
            raise FailedPrecondition("APPOINTMENT_NOT_BOOKED", "The visit isn't booked.")
        row.book(visit.id, await calendar_of(call.db, call.tenant_id, row.clinic_id), call.now)
        named = {"type": "SchedulingRequest", "id": row.id}
        if named not in visit.based_on:
            visit.based_on = [*visit.based_on, named]
        return await _answer(call, row)

    async def CloseSchedulingRequest(
        self, request: pb.CloseSchedulingRequestRequest, call: Call
    ) -> pb.SchedulingRequest:
        row = await call.get(SchedulingRequest, request.id)
        row.close(plain(request.reason), await calendar_of(call.db, call.tenant_id, row.clinic_id), call.now)
        return await _answer(call, row)


class SchedulingPreferencesServicer(SchedulingPreferencesServiceServicer):
    """How patients wish to be scheduled."""

    async def GetSchedulingPreferences(
        self, request: pb.GetSchedulingPreferencesRequest, call: Call
    ) -> pb.SchedulingPreferences:
        await call.subject(request.patient_id)
        row = await call.one(SchedulingPreferences, SchedulingPreferences.id == request.patient_id)
        if row is None:
            return pb.SchedulingPreferences(patient_id=request.patient_id)
        return to_proto(row, pb.SchedulingPreferences)

    async def SetSchedulingPreferences(
        self, request: pb.SetSchedulingPreferencesRequest, call: Call
    ) -> pb.SchedulingPreferences:
        await call.subject(request.patient_id)
        wishes = request.preferences
        await _know_all(call, Clinic, wishes.clinic_ids, "preferences.clinic_ids")
        await _know_all(call, Practitioner, wishes.practitioner_ids, "preferences.practitioner_ids")
        row = await call.one(SchedulingPreferences, SchedulingPreferences.id == request.patient_id)
        if request.etag and (row is None or request.etag != etag_of(row.version)):
            raise Aborted("ETAG_MISMATCH", "Somebody else has changed it; read it again.")
        if row is None:
            row = SchedulingPreferences(id=request.patient_id, patient_id=request.patient_id)
            await call.add(row)
        row.clinic_ids, row.practitioner_ids = list(wishes.clinic_ids), list(wishes.practitioner_ids)
        row.weekdays = sorted(set(wishes.weekdays))
        row.earliest, row.latest = wishes.earliest, wishes.latest
        row.modality = plain(wishes).get("modality", "MODALITY_UNSPECIFIED")
        row.may_be_moved = plain(wishes.may_be_moved) if wishes.HasField("may_be_moved") else None
        row.barriers = [plain(one) for one in wishes.barriers]
        await call.db.flush()
        return to_proto(row, pb.SchedulingPreferences)


async def _know(call: Call, values: dict[str, Any]) -> list[str]:
    """Put defaults, refuse what there isn't; answers the labels of clinic and visit type."""
    if values.get("priority") in (None, "CODE_UNSPECIFIED"):
        values["priority"] = "ROUTINE"
    values["visit_type_id"] = values.get("visit_type_id") or None
    first, last = values.get("earliest_date"), values.get("latest_date")
    if first and last and last < first:
        raise Invalid(
            "PERIOD_INVALID", "The latest day is before the earliest.", field="scheduling_request.latest_date"
        )
    await _know_all(call, Clinic, values.get("preferred_clinic_ids") or (), "scheduling_request.preferred_clinic_ids")
    practitioners = values.get("preferred_practitioner_ids") or ()
    await _know_all(call, Practitioner, practitioners, "scheduling_request.preferred_practitioner_ids")
    clinic = await _entry(call, Clinic, values["clinic_id"])
    if clinic is None:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="scheduling_request.clinic_id")
    labels = {*clinic.security_labels}
    if values["visit_type_id"]:
        visit_type = await _entry(call, VisitType, values["visit_type_id"])
        if visit_type is None:
            raise Invalid(
                "VISIT_TYPE_UNKNOWN", "There is no such visit type.", field="scheduling_request.visit_type_id"
            )
        labels |= {*visit_type.security_labels}
    return sorted(labels)


async def _know_owner(call: Call, owner: dict[str, str], field: str) -> None:
    """Raises Invalid `OWNER_UNKNOWN` unless it is active staff or a pool in use."""
    if owner["type"] == "Pool":
        pool = await call.db.get(Pool, (call.tenant_id, owner["id"]))
        known = pool is not None and pool.active
    else:
        known = owner["type"] == "Staff" and await call.has_staff(owner["id"])
    if not known:
        raise Invalid("OWNER_UNKNOWN", "The owner must be active staff or a pool in use.", field=field)


async def _entry(call: Call, model: Any, entry_id: str) -> Any:
    query = select(model).where(model.tenant_id == call.tenant_id, model.id == entry_id)
    return (await call.db.execute(query)).scalar_one_or_none()


async def _know_all(call: Call, model: Any, ids: Any, field: str) -> None:
    """Raises Invalid `CLINIC_UNKNOWN` or `PRACTITIONER_UNKNOWN` unless there are all of them."""
    wanted = set(ids)
    if not wanted:
        return
    query = select(func.count()).where(model.tenant_id == call.tenant_id, model.id.in_(wanted))
    if (await call.db.execute(query)).scalar_one() == len(wanted):
        return
    if model is Clinic:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field=field)
    raise Invalid("PRACTITIONER_UNKNOWN", "There is no such practitioner.", field=field)


async def _answer(call: Call, row: SchedulingRequest) -> pb.SchedulingRequest:
    await call.db.flush()
    return _shown(row, call)


def _shown(row: SchedulingRequest, call: Call) -> pb.SchedulingRequest:
    """What staff wrote for each other isn't the patient's to read here."""
    shown = to_proto(row, pb.SchedulingRequest)
    if call.caller.kind in ("patient", "related"):
        shown.note = ""
        for one in shown.attempts:
            one.note = one.actor = ""
    return shown
