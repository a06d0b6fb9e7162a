"""The waitlist over gRPC: entries, the answers to offers, and what the holder of an offer's link may do."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

from care.scheduling.v1 import waitlist_pb2 as pb
from care.scheduling.v1.waitlist_pb2_grpc import WaitlistLinksServiceServicer, WaitlistServiceServicer
from care.type.v1 import type_pb2
from sqlalchemy import BigInteger, DateTime, Text, Uuid, bindparam, func, select, text, tuple_

from chassis.call import Call, require_etag
from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, LostRace, NotFound
from chassis.ids import new_id
from chassis.model import by_id
from chassis.reading import Rows
from chassis.timers import wake_after_commit
from chassis.wire import OUTPUT_ONLY, enum_names, given, given_time, to_proto
from services.scheduling import backfill, matching
from services.scheduling.appointment import Appointment, DeceasedPatient, Status
from services.scheduling.backfill import LOOP
from services.scheduling.directory import Clinic, Practitioner, VisitType
from services.scheduling.matching import Slot
from services.scheduling.measures import FEWEST
from services.scheduling.terms import terms
from services.scheduling.waitlist import EntryStatus, OfferStatus, WaitlistEntry, WaitlistOffer, hash_of, parts_of

_NOT_GIVEN = OUTPUT_ONLY | {"status", "skips", "offer_id", "booked_appointment_id", "security_labels"}
_WINDOW = timedelta(days=30)


class WaitlistServicer(WaitlistServiceServicer):
    """Who waits, and what they are offered."""

    async def CreateWaitlistEntry(self, request: pb.CreateWaitlistEntryRequest, call: Call) -> pb.WaitlistEntry:
        await call.subject(request.patient_id)
        values = given(request.waitlist_entry, read_only=_NOT_GIVEN | {"patient_id", "visit_type_id"})
        kind = await call.db.get(VisitType, (call.tenant_id, request.visit_type_id))
        if kind is None:
            raise Invalid("VISIT_TYPE_UNKNOWN", "There is no such visit type.", field="visit_type_id")
        if await call.db.get(DeceasedPatient, (call.tenant_id, request.patient_id)) is not None:
            raise FailedPrecondition("PATIENT_DECEASED", "Nobody who has died is on the waitlist.")
        entry = WaitlistEntry(id=new_id(), patient_id=request.patient_id, visit_type_id=request.visit_type_id)
        kept = timedelta(seconds=call.runtime.settings.waitlist_kept)  # type: ignore[attr-defined]
        entry.wish_for(**{"expire_time": call.now + kept, **values})
        labels = await _check(call, entry)
        entry.security_labels = sorted({*kind.security_labels, *labels})
        entry.add()
        await call.add(entry)
        await call.db.flush()
        return to_proto(entry, pb.WaitlistEntry)

    async def GetWaitlistEntry(self, request: pb.GetWaitlistEntryRequest, call: Call) -> pb.WaitlistEntry:
        return to_proto(await call.get(WaitlistEntry, request.id), pb.WaitlistEntry)

    async def ListWaitlistEntries(
        self, request: pb.ListWaitlistEntriesRequest, call: Call
    ) -> pb.ListWaitlistEntriesResponse:
        wanted = (
            Rows(WaitlistEntry)
            .among(WaitlistEntry.patient_id, request.patient_ids)
            .among(WaitlistEntry.visit_type_id, request.visit_type_ids)
            .overlap_or_none(WaitlistEntry.clinic_ids, request.clinic_ids)
            .among(WaitlistEntry.status, enum_names(pb.WaitlistEntry.Status, request.statuses))
            .among(WaitlistEntry.priority, enum_names(type_pb2.Priority.Code, request.priorities))
        )
        rows, following = await call.page(wanted, request, WaitlistEntry.create_time, WaitlistEntry.id)
        return pb.ListWaitlistEntriesResponse(
            waitlist_entries=[to_proto(row, pb.WaitlistEntry) for row in rows], next_page_token=following
        )

    async def UpdateWaitlistEntry(self, request: pb.UpdateWaitlistEntryRequest, call: Call) -> pb.WaitlistEntry:
        entry = await call.get(WaitlistEntry, request.waitlist_entry.id, etag=require_etag(request.etag))
        values = given(request.waitlist_entry, request.update_mask, read_only=_NOT_GIVEN)
        for fixed in ("patient_id", "visit_type_id"):
            if values.pop(fixed, getattr(entry, fixed)) != getattr(entry, fixed):
                raise Invalid(
                    "FIELD_FIXED", f"{fixed} doesn't change; make another entry.", field=f"waitlist_entry.{fixed}"
                )
        if "expire_time" in values and values["expire_time"] is None:
            kept = timedelta(seconds=call.runtime.settings.waitlist_kept)  # type: ignore[attr-defined]
            values["expire_time"] = entry.create_time + kept
        entry.wish_for(**values)
        labels = await _check(call, entry)
        entry.security_labels = sorted({*entry.security_labels, *labels})
        entry.tell("changed")
        await call.db.flush()
        return to_proto(entry, pb.WaitlistEntry)

    async def WithdrawWaitlistEntry(self, request: pb.WithdrawWaitlistEntryRequest, call: Call) -> pb.WaitlistEntry:
        entry = await call.get(WaitlistEntry, request.id)
        entry.lifecycle.arrow("withdraw", entry.status)
        if entry.status is EntryStatus.OFFERED and not await backfill.withdraw_offer(call.db, entry, "withdrawn"):
            raise LostRace(backfill.in_hand())
        entry.withdraw()
        wake_after_commit(call.db, LOOP)
        await call.db.flush()
        return to_proto(entry, pb.WaitlistEntry)

    async def GetWaitlistScore(self, request: pb.GetWaitlistScoreRequest, call: Call) -> pb.WaitlistScore:
        entry = await call.get(WaitlistEntry, request.id)
        now = (await call.db.execute(select(func.clock_timestamp()))).scalar_one()
        held = await terms(call.db, call.tenant_id, entry.visit_type_id, request.clinic_id or None, now)
        before = None
        if entry.appointment_id is not None:
            older = select(Appointment.start_time).where(
                by_id(Appointment, call.tenant_id, entry.appointment_id), Appointment.status == Status.BOOKED
            )
            before = (await call.db.execute(older)).scalar_one_or_none()
        wish, slot, misfits = entry.wish(before), None, ()
        if request.clinic_id:
            slot = await _slot(request, call, entry)
            misfits = matching.misfits(wish, slot, now)
            if not request.HasField("start_time"):
                misfits = tuple(one for one in misfits if one in ("clinic", "practitioner", "expired"))
            elif matching.answer_by(slot, now, held.rules) is None:
                misfits = (*misfits, "lockout")
            if not request.practitioner_id:
                misfits = tuple(one for one in misfits if one != "practitioner")
        score = matching.score(wish, slot, now, held.weights)
        return pb.WaitlistScore(
            entry_id=entry.id,
            score=score.total,
            parts=[pb.WaitlistScorePart(**part) for part in parts_of(score)],
            misfits=misfits,
            policy_version=held.version,
        )

    async def GetWaitlistOffer(self, request: pb.GetWaitlistOfferRequest, call: Call) -> pb.WaitlistOffer:
        return to_proto(await call.get(WaitlistOffer, request.id), pb.WaitlistOffer)

    async def ListWaitlistOffers(
        self, request: pb.ListWaitlistOffersRequest, call: Call
    ) -> pb.ListWaitlistOffersResponse:
        wanted = (
            Rows(WaitlistOffer)
            .among(WaitlistOffer.patient_id, request.patient_ids)
            .among(WaitlistOffer.entry_id, request.entry_ids)
            .among(WaitlistOffer.status, enum_names(pb.WaitlistOffer.Status, request.statuses))
        )
        rows, following = await call.page(wanted, request, WaitlistOffer.create_time, WaitlistOffer.id, descending=True)
        return pb.ListWaitlistOffersResponse(
            waitlist_offers=[to_proto(row, pb.WaitlistOffer) for row in rows], next_page_token=following
        )

    async def AcceptWaitlistOffer(self, request: pb.AcceptWaitlistOfferRequest, call: Call) -> pb.WaitlistOffer:
        return await _answered_at_desk(call, request.id, OfferStatus.ACCEPTED)

    async def DeclineWaitlistOffer(self, request: pb.DeclineWaitlistOfferRequest, call: Call) -> pb.WaitlistOffer:
        return await _answered_at_desk(call, request.id, OfferStatus.DECLINED)

    async def GetWaitlistMeasures(self, request: pb.GetWaitlistMeasuresRequest, call: Call) -> pb.WaitlistMeasures:
        now = (await call.db.execute(select(func.clock_timestamp()))).scalar_one()
        values = {
            "tenant": call.tenant_id,
            "clinic": request.clinic_id or None,
            "first": given_time(request, "start_time") or now - _WINDOW,
            "end": given_time(request, "end_time") or now,
        }
        slots = (await call.records(_SLOTS, values))[0]
        groups = _groups(await call.records(_GROUPS, values))
        return pb.WaitlistMeasures(
            freed=slots[0],
            offered_slots=slots[1],
            filled=slots[2],
            median_fill_seconds=int(slots[3] or 0),
            outcomes=_outcomes([sum(getattr(one.outcomes, name) for one in groups) for name in _COUNTED]),
            groups=groups,
        )

    async def IssueWaitlistOfferLink(
        self, request: pb.IssueWaitlistOfferLinkRequest, call: Call
    ) -> pb.IssueWaitlistOfferLinkResponse:
        offer = await call.get(WaitlistOffer, request.offer_id)
        is_open = offer.status is OfferStatus.OPEN and offer.expire_time > call.now
        return to_proto(offer, pb.IssueWaitlistOfferLinkResponse, token=offer.new_link() if is_open else "")


class WaitlistLinksServicer(WaitlistLinksServiceServicer):
    """The link is the credential; nothing answered here says who the patient is, or what the visit is for."""

    async def GetWaitlistOfferByLink(
        self, request: pb.GetWaitlistOfferByLinkRequest, call: Call
    ) -> pb.WaitlistOfferByLink:
        offer = await call.by_link(WaitlistOffer, WaitlistOffer.token_hash == hash_of(request.token))
        if offer is None:
            raise NotFound("LINK_UNKNOWN", "There is no such link.")
        now = (await call.db.execute(select(func.clock_timestamp()))).scalar_one()
        if offer.status not in (OfferStatus.ACCEPTED, OfferStatus.DECLINED):
            _refuse_ended(offer, now)
        return await _page(call, offer)

    async def AnswerWaitlistOfferByLink(
        self, request: pb.AnswerWaitlistOfferByLinkRequest, call: Call
    ) -> pb.WaitlistOfferByLink:
        named = select(WaitlistOffer.tenant_id, WaitlistOffer.id).where(
            WaitlistOffer.token_hash == hash_of(request.token)
        )
        # The appointment first, as everybody who answers an offer does.
        hold = await call.by_link(Appointment, tuple_(Appointment.tenant_id, Appointment.id).in_(named))
        offer = hold and await call.by_link(WaitlistOffer, by_id(WaitlistOffer, hold.tenant_id, hold.id))
        if hold is None or offer is None:
            raise NotFound("LINK_UNKNOWN", "There is no such link.")
        wanted = OfferStatus.ACCEPTED if request.accept else OfferStatus.DECLINED
        if offer.status is not wanted:
            if offer.status in (OfferStatus.ACCEPTED, OfferStatus.DECLINED):
                raise _answered()
            _refuse_ended(offer, call.now)
            entry = await call.by_link(WaitlistEntry, by_id(WaitlistEntry, offer.tenant_id, offer.entry_id))
            assert entry is not None
            try:
                await _answer(call, hold, offer, entry, wanted)
            except FailedPrecondition as problem:
                raise _ended() if problem.reason == "OFFER_EXPIRED" else problem from None
        return await _page(call, offer)


# -- entries -----------------------------------------------------------------------------------------------------------


async def _check(call: Call, entry: WaitlistEntry) -> Iterable[str]:
    """Whether what an entry names exists; answers the labels of the clinics that it names.

    Raises Invalid `CLINIC_UNKNOWN`, `PRACTITIONER_UNKNOWN`, `EXPIRY_INVALID`, `APPOINTMENT_UNFIT`.
    """
    if entry.expire_time <= call.now:
        raise Invalid("EXPIRY_INVALID", "The expiry is past.", field="waitlist_entry.expire_time")
    labels: set[str] = set()
    if entry.clinic_ids:
        clinics = select(Clinic).where(Clinic.tenant_id == call.tenant_id, Clinic.id.in_(entry.clinic_ids))
        found = list((await call.db.execute(clinics)).scalars())
        if len(found) < len(set(entry.clinic_ids)):
            raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="waitlist_entry.clinic_ids")
        labels = {label for clinic in found for label in clinic.security_labels}
    if entry.practitioner_ids:
        known = select(func.count()).where(
            Practitioner.tenant_id == call.tenant_id, Practitioner.id.in_(entry.practitioner_ids)
        )
        if (await call.db.execute(known)).scalar_one() < len(set(entry.practitioner_ids)):
            raise Invalid(
                "PRACTITIONER_UNKNOWN", "There is no such practitioner.", field="waitlist_entry.practitioner_ids"
            )
    entry.appointment_id = entry.appointment_id or None
    if entry.appointment_id is not None:
        theirs = select(Appointment.id).where(
            by_id(Appointment, call.tenant_id, entry.appointment_id),
            Appointment.patient_id == entry.patient_id,
            Appointment.visit_type_id == entry.visit_type_id,
            Appointment.status == Status.BOOKED,
        )
        if (await call.db.execute(theirs)).first() is None:
            raise Invalid(
                "APPOINTMENT_UNFIT",
                "What is given up must be a booked visit of this patient and visit type.",
                field="waitlist_entry.appointment_id",
            )
    return labels


async def _slot(request: pb.GetWaitlistScoreRequest, call: Call, entry: WaitlistEntry) -> Slot:
    query = (
        select(Clinic.time_zone, VisitType.duration_minutes)
        .join(VisitType, VisitType.tenant_id == Clinic.tenant_id)
        .where(Clinic.tenant_id == call.tenant_id, Clinic.id == request.clinic_id, VisitType.id == entry.visit_type_id)
    )
    row = (await call.db.execute(query)).one_or_none()
    if row is None:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
    start = given_time(request, "start_time") or entry.create_time
    end = start + timedelta(minutes=row.duration_minutes)
    return Slot(entry.visit_type_id, request.clinic_id, request.practitioner_id, start, end, row.time_zone or "UTC")


# -- answers -----------------------------------------------------------------------------------------------------------


async def _answered_at_desk(call: Call, offer_id: str, wanted: OfferStatus) -> pb.WaitlistOffer:
    hold = await call.get(Appointment, offer_id)
    offer = await call.one(WaitlistOffer, by_id(WaitlistOffer, call.tenant_id, offer_id))
    if offer is None:
        raise NotFound()
    if offer.status is not wanted:
        if offer.status in (OfferStatus.ACCEPTED, OfferStatus.DECLINED):
            raise _answered()
        if offer.status is not OfferStatus.OPEN or offer.expire_time <= call.now:
            raise backfill.over()
        entry = await call.get(WaitlistEntry, offer.entry_id)
        await _answer(call, hold, offer, entry, wanted)
    return to_proto(offer, pb.WaitlistOffer)


async def _answer(
    call: Call, hold: Appointment, offer: WaitlistOffer, entry: WaitlistEntry, wanted: OfferStatus
) -> None:
    if wanted is OfferStatus.ACCEPTED:
        await backfill.accept(call.db, hold, offer, entry)
    else:
        await backfill.let_go(call.db, hold, offer, wanted)
        entry.decline(offer)
    wake_after_commit(call.db, LOOP)
    await call.db.flush()


def _answered() -> AlreadyExists:
    return AlreadyExists("OFFER_ANSWERED", "This offer was answered before; the first answer is kept.")


def _refuse_ended(offer: WaitlistOffer, now: datetime) -> None:
    if offer.status is not OfferStatus.OPEN or offer.expire_time <= now:
        raise _ended()


def _ended() -> FailedPrecondition:
    return FailedPrecondition("LINK_EXPIRED", "The time to answer this offer is over.", kind="waitlist")


async def _page(call: Call, offer: WaitlistOffer) -> pb.WaitlistOfferByLink:
    clinic = (await call.db.execute(select(Clinic).where(by_id(Clinic, offer.tenant_id, offer.clinic_id)))).scalar_one()
    labelled = bool(offer.security_labels or clinic.security_labels)
    phones = [one.get("e164") or one["value"] for one in clinic.telecom or () if one.get("system") == "PHONE"]
    return to_proto(
        offer,
        pb.WaitlistOfferByLink,
        clinic=clinic.discreet_name or ("" if labelled else clinic.name),
        phone=phones[0] if phones else "",
    )


# -- counts ------------------------------------------------------------------------------------------------------------

_COUNTED = ("offered", "accepted", "declined", "expired", "unavailable")
_NAMED: list[Any] = [
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("clinic", type_=Uuid(as_uuid=False)),
    bindparam("first", type_=DateTime(timezone=True)),
    bindparam("end", type_=DateTime(timezone=True)),
]
_SLOTS = (
    text(
        "SELECT count(*) AS freed, count(*) FILTER (WHERE offers > 0) AS offered_slots,"
        " count(*) FILTER (WHERE status = 'FILLED') AS filled,"
        " coalesce(extract(epoch FROM percentile_cont(0.5) WITHIN GROUP (ORDER BY end_status_time - create_time)"
        " FILTER (WHERE status = 'FILLED'))::bigint, 0) AS median FROM freed_slot"
        " WHERE tenant_id = :tenant AND create_time >= :first AND create_time < :end"
        " AND (CAST(:clinic AS uuid) IS NULL OR clinic_id = :clinic)"
    )
    .bindparams(*_NAMED)
    .columns(freed=BigInteger, offered_slots=BigInteger, filled=BigInteger, median=BigInteger)
)
_GROUPS = (
    text(
        "SELECT e.language, e.age_band, count(*) AS offered,"
        + ",".join(f" count(*) FILTER (WHERE o.status = '{one.upper()}') AS {one}" for one in _COUNTED[1:])
        + " FROM waitlist_offer o JOIN waitlist_entry e ON e.tenant_id = o.tenant_id AND e.id = o.entry_id"
        " WHERE o.tenant_id = :tenant AND o.create_time >= :first AND o.create_time < :end"
        " AND (CAST(:clinic AS uuid) IS NULL OR o.clinic_id = :clinic) GROUP BY 1, 2 ORDER BY 1, 2"
    )
    .bindparams(*_NAMED)
    .columns(language=Text, age_band=Text, **dict.fromkeys(_COUNTED, BigInteger()))
)


def _groups(rows: Iterable[Sequence[Any]]) -> list[pb.WaitlistMeasures.Group]:
    """Offers by group; groups of so few that somebody might be recognized are joined into one without a name."""
    joined: dict[tuple[str, str], list[int]] = {}
    for language, band, *counts in rows:
        name = (language, band) if counts[0] >= FEWEST else ("", "")
        joined[name] = [a + b for a, b in zip(joined.get(name, [0] * len(counts)), counts, strict=True)]
    return [
        pb.WaitlistMeasures.Group(language=language, age_band=band, outcomes=_outcomes(counts))
        for (language, band), counts in sorted(joined.items())
    ]


def _outcomes(counts: Iterable[int]) -> pb.WaitlistMeasures.Outcomes:
    return pb.WaitlistMeasures.Outcomes(**dict(zip(_COUNTED, counts, strict=True)))
