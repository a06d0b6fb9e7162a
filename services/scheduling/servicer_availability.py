"""Free slots over gRPC: a page of them, counts, and trips of several visits."""

import hashlib
from dataclasses import replace
from datetime import date
from functools import lru_cache
from itertools import islice

from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1 import availability_views_pb2 as views
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1.appointments_pb2_grpc import AvailabilityServiceServicer
from care.scheduling.v1.availability_views_pb2_grpc import AvailabilityViewsServiceServicer
from google.protobuf.message import Message

from chassis.call import Call
from chassis.errors import Invalid
from chassis.signing import Signer
from chassis.wire import enum_names, to_proto, to_time
from services.scheduling import eligibility, offers
from services.scheduling.availability import Slot, earliest_first, free_starts
from services.scheduling.directory import VisitType
from services.scheduling.finding import About, Found, Free, Looking, Search, about, counts, find, taken, window, wishes
from services.scheduling.offers import Place
from services.scheduling.panels import Step, panels
from services.scheduling.servicer_appointments import is_self_service
from services.scheduling.snapshot import Directories, Directory

_PAGE, _PAGE_AT_MOST = 50, 200
_PANELS, _PANEL_DAYS_AT_MOST, _GAP_AT_MOST = 10, 31, 240


class AvailabilityServicer(AvailabilityServiceServicer):
    """What is free."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    async def SearchAvailability(
        self, request: pb.SearchAvailabilityRequest, call: Call
    ) -> pb.SearchAvailabilityResponse:
        after, end = _opened(request, call)
        directory, mirror = await self._directories.current(
            call.runtime.database, call.tenant_id, call.records, lambda: call.db
        )
        known = await _about(request, call, directory, int(mirror.now), end)
        search = _search(request, call, directory)
        if end:
            search = replace(search, end=end)
        size = min(max(request.page_size or _PAGE, 1), _PAGE_AT_MOST)
        now = int(mirror.now)
        free = await find(call.records, directory, search, now, size + 1, after, mirror=mirror, about=known)
        offered = _Offered(call, free, search)
        answer = pb.SearchAvailabilityResponse(
            slots=[offered.slot(one.slot) for one in free.found[:size]], ineligible=free.ineligible
        )
        if len(free.found) > size:
            rank, last = free.found[size - 1]
            answer.next_page_token = call.runtime.page_signer.sign(
                [_shape(request), call.actor, rank, last.start, last.clinic_id, last.practitioner_id, free.end]
            )
        return answer


class AvailabilityViewsServicer(AvailabilityViewsServiceServicer):
    """Counts and trips."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    async def SearchDayCounts(self, request: views.SearchDayCountsRequest, call: Call) -> views.SearchDayCountsResponse:
        directory, mirror = await self._directories.current(
            call.runtime.database, call.tenant_id, call.records, lambda: call.db
        )
        known = await _about(request.search, call, directory, int(mirror.now))
        search = _search(request.search, call, directory)
        free, days = await counts(call.records, directory, search, int(mirror.now), mirror=mirror, about=known)
        counted = [_counted(*one, free.zones[one[0]]) for one in sorted(days)]
        return views.SearchDayCountsResponse(ineligible=free.ineligible, days=counted)

    async def SearchPanel(self, request: views.SearchPanelRequest, call: Call) -> views.SearchPanelResponse:
        if request.patient_id:
            await call.subject(request.patient_id)
        directory, mirror = await self._directories.current(
            call.runtime.database, call.tenant_id, call.records, lambda: call.db
        )
        now = int(mirror.now)
        start, end = window(_given(request, "start_time"), _given(request, "end_time"), now, _PANEL_DAYS_AT_MOST)
        looking: list[Looking] = []
        steps: list[Step] = []
        last, ineligible = max(start, end), set()  # a window that is over ends before it begins
        for number, asked in enumerate(request.steps):
            widest = 60 * (asked.maximum_gap_minutes or _GAP_AT_MOST)
            if 60 * asked.minimum_gap_minutes > widest:
                raise Invalid("GAP_INVALID", "minimum_gap_minutes is above maximum_gap_minutes.", field="steps")
            visit_type = directory.visit_type(asked.visit_type_id)
            # What follows the last of the first visits must still be seen.
            last += 60 * visit_type.duration_minutes + (widest if number else 0)
            search = _panel_search(request, asked, call, visit_type, start, last)
            one = Looking(call.records, directory, search, now, Free(now, start, last))
            if not await one.begin():
                ineligible.update(one.free.ineligible)
                continue
            await one.limit(one.seats, start, last)
            looking.append(one)
            asks = visit_type.asks
            steps.append(Step(60 * asked.minimum_gap_minutes, widest, 60 * asks.buffer_before, 60 * asks.buffer_after))
        answer = views.SearchPanelResponse(ineligible=sorted(ineligible))
        if len(looking) < len(request.steps):
            return answer
        reach = 60 * max(_reach(one.visit_type) for one in looking)
        busy = await taken(
            call.records,
            call.tenant_id,
            set().union(*(one.who(one.seats) for one in looking)),
            start - reach,
            last + reach,
        )
        streams = [
            earliest_first(
                *(
                    free_starts(*who, clinic_id=clinic_id, **how)  # type: ignore[arg-type]
                    for clinic_id, who, how in one.at(one.seats, busy, start, last if number else end)
                )
            )
            for number, one in enumerate(looking)
        ]
        ways = {frozenset((one.clinic_id, one.other_clinic_id)): 60 * one.minutes for one in request.travels}
        trips = panels(
            streams, steps, lambda here, there: ways.get(frozenset((here, there)), 60 * request.travel_minutes)
        )
        offered = [_Offered(call, one.free, one.search) for one in looking]
        for trip in islice(trips, request.at_most or _PANELS):
            answer.panels.add(slots=[offer.slot(slot) for offer, slot in zip(offered, trip, strict=True)])
        return answer


async def _about(
    request: pb.SearchAvailabilityRequest, call: Call, directory: Directory, now: int, end: int = 0
) -> About | None:
    """What must be known of the patient and of quotas. First: what else is asked of the patient is asked of who is seen."""
    if not request.patient_id and not any(seat.limited for seat in directory.seats):
        return None
    directory.visit_type(request.visit_type_id)
    asked = window(_given(request, "start_time"), end or _given(request, "end_time"), now)
    sight = call.sight(request.patient_id) if request.patient_id else None
    return await about(call.records, directory, call.tenant_id, request.visit_type_id, asked, sight, request.clinic_ids)


@lru_cache(20_000)
def _counted(clinic_id: str, day: int, count: int, first: int, zone: str) -> Message:
    """A message that goes into answers as a copy."""
    made = views.SearchDayCountsResponse().days.add(
        clinic_id=clinic_id, date=date.fromordinal(day).isoformat(), slots=count, time_zone=zone
    )
    made.first_start_time.seconds = first
    return made


class _Offered:
    """Slots as they are answered, each with a token that says what it is."""

    def __init__(self, call: Call, free: Free, search: Search) -> None:
        self._tenant_id, self._free, self._search = call.tenant_id, free, search
        self._secret = call.runtime.settings.signing_secret
        lifetime = int(call.runtime.settings.offer_lifetime)  # type: ignore[attr-defined]
        # So long at least: who searches within the same minute is offered the same.
        step = max(1, min(60, lifetime // 15))
        self._expires = -(-(free.now + lifetime) // step) * step

    def slot(self, slot: Slot) -> Message:
        """The message, which goes into answers as a copy."""
        free, search = self._free, self._search
        return _offer(
            self._secret,
            self._tenant_id,
            search.visit_type_id,
            slot,
            search.interpreter_language,
            self._expires,
            free.zones[slot.clinic_id],
            round(free.distances.get(slot.clinic_id, 0.0), 1) if free.distances else 0.0,
            bool(free.held) and slot in free.held,
        )


@lru_cache(20_000)
def _offer(
    secret: str,
    tenant_id: str,
    visit_type_id: str,
    slot: Slot,
    language: str,
    expires: int,
    zone: str,
    distance: float,
    held_back: bool,
) -> Message:
    place = Place(visit_type_id, slot.clinic_id, slot.practitioner_id, slot.start, slot.resource_ids, language)
    found = to_proto(
        slot,
        pb.Slot,
        visit_type_id=visit_type_id,
        time_zone=zone,
        offer_token=Signer(secret, "offer").sign(offers.written(tenant_id, place, expires)),
        distance_km=distance,
        held_back=held_back,
        interpreter_language=language,
    )
    found.start_time.seconds, found.end_time.seconds = slot.start, slot.end
    return found


def _search(request: pb.SearchAvailabilityRequest, call: Call, directory: Directory) -> Search:
    """What is looked for. Raises NeedFact where a rule asks for what only patients knows."""
    if request.held_back:
        call.require("appointments.held_back")
    near = request.near
    return Search(
        call.tenant_id,
        request.visit_type_id,
        frozenset(request.clinic_ids),
        frozenset(request.practitioner_ids),
        _given(request, "start_time"),
        _given(request, "end_time"),
        request.patient_id,
        wishes(request.weekdays, request.earliest, request.latest),
        languages=tuple(request.languages),
        genders=tuple(request.genders),
        specialties=tuple(request.specialties),
        modalities=enum_names(directory_pb2.VisitType.Modality, request.modalities),
        near=(near.position.latitude, near.position.longitude, near.within_km) if request.HasField("near") else None,
        interpreter_language=request.interpreter_language,
        own_practitioner_id=request.own_practitioner_id,
        team_practitioner_ids=tuple(request.team_practitioner_ids),
        licensed_state=request.licensed_state,
        referral=request.has_referral,
        payer=request.payer,
        held_back=request.held_back,
        self_service=is_self_service(call),
        facts=_facts(call, directory.visit_type(request.visit_type_id), request.patient_id),
    )


def _panel_search(
    request: views.SearchPanelRequest,
    asked: views.SearchPanelRequest.Step,
    call: Call,
    visit_type: VisitType,
    start: int,
    end: int,
) -> Search:
    return Search(
        call.tenant_id,
        asked.visit_type_id,
        frozenset(asked.clinic_ids),
        frozenset(asked.practitioner_ids),
        start,
        end,
        request.patient_id,
        wishes(request.weekdays, request.earliest, request.latest),
        interpreter_language=request.interpreter_language,
        referral=request.has_referral,
        payer=request.payer,
        self_service=is_self_service(call),
        facts=_facts(call, visit_type, request.patient_id),
    )


def _facts(call: Call, visit_type: VisitType, patient_id: str) -> eligibility.Facts:
    licence = visit_type.licence_required and visit_type.remote
    if not patient_id or not (licence or eligibility.needs_facts(visit_type.eligibility)):
        return eligibility.NOTHING
    known: eligibility.Facts = call.fact("facts", patient_id)
    return known


def _reach(visit_type: VisitType) -> int:
    asks = visit_type.asks
    return asks.duration + asks.buffer_before + asks.buffer_after


def _opened(request: pb.SearchAvailabilityRequest, call: Call) -> tuple[Found | None, int]:
    """The last slot of the page before and the end of its window; a page stays right while others book.

    A token serves only the query and the caller that it was made for: it goes on in that caller's view.
    """
    if not request.page_token:
        return None, 0
    opened = call.runtime.page_signer.open(request.page_token)
    if not isinstance(opened, list) or len(opened) != 7 or opened[:2] != [_shape(request), call.actor]:
        raise Invalid(
            "PAGE_TOKEN_INVALID", "The page token is not of this query; begin with the first page.", field="page_token"
        )
    _, _, rank, start, clinic_id, practitioner_id, end = opened
    # After every slot of this start, place and person, whatever rooms they would take.
    return Found(rank, Slot(start, clinic_id, practitioner_id, 1 << 62, ())), end


def _shape(request: pb.SearchAvailabilityRequest) -> str:
    bare = pb.SearchAvailabilityRequest()
    bare.CopyFrom(request)
    bare.ClearField("page_token")
    bare.ClearField("page_size")
    return hashlib.blake2b(bare.SerializeToString(deterministic=True), digest_size=8).hexdigest()


def _given(request: pb.SearchAvailabilityRequest | views.SearchPanelRequest, field: str) -> int:
    """Epoch seconds, 0 where it isn't said. A start falls on whole seconds: within one begins with the next."""
    if not request.HasField(field):  # type: ignore[arg-type]
        return 0
    return -int(-to_time(getattr(request, field)).timestamp() // 1)
