"""The referral loop over gRPC."""

from typing import Any

from care.referrals.v1 import referrals_pb2 as pb
from care.referrals.v1.referrals_pb2_grpc import ReferralsServiceServicer
from care.type.v1 import type_pb2
from sqlalchemy import select

from chassis.call import Call, require_etag
from chassis.errors import FailedPrecondition, Invalid, PermissionDenied
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, given, given_time, plain, to_proto, to_time
from services.referrals.projections import Calendar, calendar_of, clinic_of, pool_for, pool_of
from services.referrals.reactions import follow
from services.referrals.referral import (
    CLOSED_STATES,
    Referral,
    ReferralIdentifier,
    ReferralVisit,
    State,
)

_READ_ONLY = OUTPUT_ONLY | {
    "status",
    "business_status",
    "due_time",
    "due_basis",
    "next_action",
    "pool_id",
    "appointment_id",
    "appointment_time",
    "attempts",
    "report",
    "outcome",
    "history",
}


class ReferralsServicer(ReferralsServiceServicer):
    """Referrals, from draft to closed."""

    async def CreateReferral(self, request: pb.CreateReferralRequest, call: Call) -> pb.Referral:
        values = given(request.referral, read_only=_READ_ONLY)
        for needed in ("patient_id", "specialty", "clinic_id"):
            if not values.get(needed):
                raise Invalid(
                    f"{needed.removesuffix('_id').upper()}_MISSING",
                    f"A referral needs {needed}.",
                    field=f"referral.{needed}",
                )
        await call.subject(values["patient_id"])
        owner = values.pop("owner", None) or _oneself(call)
        await _know_owner(call, owner)
        referral = Referral(id=new_id(), **await _clean(call, values))
        referral.priority = referral.priority or "ROUTINE"
        referral.own(owner["type"], owner["id"])
        referral.requester_id = call.caller.id if call.caller.kind == "staff" else None
        referral.create(await _calendar(call, referral), call.now)
        await call.add(referral)
        await _claim_identifiers(call, referral)
        return await _answer(call, referral)

    async def GetReferral(self, request: pb.GetReferralRequest, call: Call) -> pb.Referral:
        return to_proto(await call.get(Referral, request.id), pb.Referral)

    async def ListReferrals(self, request: pb.ListReferralsRequest, call: Call) -> pb.ListReferralsResponse:
        if len(request.patient_ids) == 1:
            await call.subject(request.patient_ids[0])
        states = enum_names(pb.Referral.BusinessStatus.Code, request.business_statuses)
        wanted = (
            Rows(Referral)
            .among(Referral.patient_id, request.patient_ids)
            .among(Referral.owner_id, request.owner_ids)
            .among(Referral.clinic_id, request.clinic_ids)
            .among(Referral.business_status, states)
            .outside(Referral.business_status, CLOSED_STATES if request.open else ())
            .before(Referral.due_time, given_time(request, "due_before"))
        )
        rows, following = await call.page(wanted, request, Referral.list_time, Referral.id)
        return pb.ListReferralsResponse(
            referrals=[to_proto(row, pb.Referral) for row in rows], next_page_token=following
        )

    async def UpdateReferral(self, request: pb.UpdateReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.referral.id, etag=require_etag(request.etag))
        values = given(request.referral, request.update_mask, read_only=_READ_ONLY)
        if values.pop("patient_id", referral.patient_id) not in ("", referral.patient_id):
            raise Invalid("FIELD_FIXED", "patient_id can't be changed.", field="referral.patient_id")
        for needed in ("specialty", "clinic_id"):
            if needed in values and not values[needed]:
                raise Invalid(
                    f"{needed.removesuffix('_id').upper()}_MISSING",
                    f"A referral needs {needed}.",
                    field=f"referral.{needed}",
                )
        if values.get("owner") not in (None, referral.owner):
            await _know_owner(call, values["owner"])
        if values.get("clinic_id", referral.clinic_id) != referral.clinic_id or "security_labels" in values:
            kept = {"clinic_id": referral.clinic_id, "security_labels": referral.security_labels}
            values = await _clean(call, {**kept, **values})
        elif values.get("priority") == "CODE_UNSPECIFIED":
            values["priority"] = "ROUTINE"
        clinic_id = values.get("clinic_id", referral.clinic_id)
        referral.change(values, await calendar_of(call.db, call.tenant_id, clinic_id))
        if "identifiers" in values:
            await _claim_identifiers(call, referral)
        return await _answer(call, referral)

    async def SubmitReferral(self, request: pb.SubmitReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id, etag=request.etag)
        referral.refuse_unless([State.DRAFT], "submit")
        if request.pool_id:
            pool = await pool_of(call.db, call.tenant_id, request.pool_id)
            if pool is None:
                raise FailedPrecondition("NO_POOL", "There is no such pool in use.")
        else:
            pool = await pool_for(call.db, call.tenant_id, referral.clinic_id, referral.specialty["code"])
        referral.submit(pool.id, await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def AcceptReferral(self, request: pb.AcceptReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id, etag=request.etag)
        referral.accept(await _calendar(call, referral), call.now)
        # Two versions for two steps: a visit may have been booked before anybody accepted.
        await call.db.flush()
        await follow(call.db, referral, call.now)
        return await _answer(call, referral)

    async def DeclineReferral(self, request: pb.DeclineReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id, etag=request.etag)
        referral.decline(plain(request.reason), await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def RecordAppointment(self, request: pb.RecordAppointmentRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id)
        referral.refuse_unless([State.ACCEPTED, State.SCHEDULED, State.UNATTENDED], "record_appointment")
        at = to_time(request.appointment_time)
        if request.seen and at > call.now:
            raise Invalid("NOT_YET", "A visit in the future can't have taken place.", field="appointment_time")
        visits = await call.db.execute(
            select(ReferralVisit).where(
                ReferralVisit.tenant_id == call.tenant_id,
                ReferralVisit.referral_id == referral.id,
                ReferralVisit.outside,
            )
        )
        visit = next((one for one in visits.scalars() if one.live), None)
        if visit is None:
            visit = ReferralVisit(
                tenant_id=call.tenant_id,
                id=new_id(),
                referral_id=referral.id,
                patient_id=referral.patient_id,
                outside=True,
            )
            call.db.add(visit)
        visit.status = "FULFILLED" if request.seen else "BOOKED"
        visit.start_time = visit.end_time = at
        await follow(call.db, referral, call.now)
        return await _answer(call, referral)

    async def RecordReport(self, request: pb.RecordReportRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id)
        report: dict[str, Any] = {"document": plain(request.document)}
        if request.HasField("author_time"):
            report["author_time"] = to_time(request.author_time).isoformat()
        if request.source:
            report["source"] = type_pb2.Source.Code.Name(request.source)
        referral.record_report(report, await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def AcknowledgeReport(self, request: pb.AcknowledgeReportRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id)
        referral.acknowledge_report(await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def RecordPatientInformed(self, request: pb.RecordPatientInformedRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id)
        how = {"channel": type_pb2.Channel.Code.Name(request.channel), "contact_id": request.contact_id}
        referral.inform_patient(how, await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def CloseReferral(self, request: pb.CloseReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id)
        outcome = plain(request.outcome) if request.HasField("outcome") else None
        referral.close(outcome, await _calendar(call, referral), call.now)
        return await _answer(call, referral)

    async def CancelReferral(self, request: pb.CancelReferralRequest, call: Call) -> pb.Referral:
        referral = await call.get(Referral, request.id, etag=request.etag)
        referral.cancel(plain(request.reason), await _calendar(call, referral), call.now)
        return await _answer(call, referral)


async def _answer(call: Call, referral: Referral) -> pb.Referral:
    await call.db.flush()
    return to_proto(referral, pb.Referral)


async def _calendar(call: Call, referral: Referral) -> Calendar:
    return await calendar_of(call.db, call.tenant_id, referral.clinic_id)


def _oneself(call: Call) -> dict[str, str]:
    if call.caller.kind != "staff":
        raise Invalid("OWNER_MISSING", "Say who owns the draft.", field="referral.owner")
    return {"type": "Staff", "id": call.caller.id}


async def _clean(call: Call, values: dict[str, Any]) -> dict[str, Any]:
    """Values with the clinic's labels and a priority. Raises where the clinic can't refer or is not the caller's.

    A referral lets its clinic see the patient: nobody may show a patient to others' clinics that way.
    """
    clinic = await clinic_of(call.db, call.tenant_id, values["clinic_id"])
    if call.caller.kind == "staff" and clinic.id not in call.caller.group_ids:
        raise PermissionDenied("NOT_OWN_CLINIC", "You don't belong to this clinic.")
    if values.get("priority") == "CODE_UNSPECIFIED":
        values["priority"] = "ROUTINE"
    values["security_labels"] = sorted({*values.get("security_labels", ()), *clinic.security_labels})
    return values


async def _know_owner(call: Call, owner: dict[str, str]) -> None:
    """Raises Invalid `OWNER_UNKNOWN` unless it is active staff or a pool in use."""
    if owner["type"] == "Pool":
        known = await pool_of(call.db, call.tenant_id, owner["id"]) is not None
    else:
        known = owner["type"] == "Staff" and await call.has_staff(owner["id"])
    if not known:
        raise Invalid("OWNER_UNKNOWN", "The owner must be active staff or a pool in use.", field="referral.owner")


async def _claim_identifiers(call: Call, referral: Referral) -> None:
    """Make the claims of a referral those of its list; one that is another's breaks the unique key at the flush."""
    rows = await call.db.execute(
        select(ReferralIdentifier).where(
            ReferralIdentifier.tenant_id == call.tenant_id, ReferralIdentifier.referral_id == referral.id
        )
    )
    claims = {(claim.system, claim.value): claim for claim in rows.scalars()}
    wanted = {(one["system"], one["value"]) for one in referral.identifiers or ()}
    for key, claim in claims.items():
        if key not in wanted:
            await call.db.delete(claim)
    for system, value in sorted(wanted - claims.keys()):
        call.db.add(
            ReferralIdentifier(
                tenant_id=call.tenant_id, id=new_id(), referral_id=referral.id, system=system, value=value
            )
        )
