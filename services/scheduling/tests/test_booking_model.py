"""Holding, booking, moving, cancelling, expiring and overbooking in any order, against an oracle that counts minutes.

No server and no clock: the aggregate and the choice of lanes are those of the service; the table is played by a list under
the same constraint. The oracle knows only what was acknowledged, and never looks at a lane.
"""

from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from chassis.errors import Problem
from services.scheduling.appointment import Appointment, Status
from services.scheduling.booking import STAFF, Candidate, Chosen, Found, Overbooking
from services.scheduling.directory import Clinic, Practitioner, Schedule, VisitType, weekly
from services.scheduling.offers import Place

MONDAY = datetime(2031, 6, 2, tzinfo=UTC)
DURATION, BEFORE, AFTER, CAP, HELD = 30, 5, 10, 1, 20
PEOPLE = {"dr-1": 1, "dr-2": 2, "room": 3, "pat-1": 11, "pat-2": 12, "pat-3": 13, "pat-4": 14}
STANDING = {Status.PENDING, Status.BOOKED, Status.ARRIVED}
ALL_WEEK = [{"weekday": day, "start": "00:00", "end": "00:00"} for day in range(1, 8)]
doctors = st.sampled_from(["dr-1", "dr-2"])
patients = st.sampled_from(["pat-1", "pat-2", "pat-3", "pat-4"])
minutes = st.sampled_from(range(600, 720, 15))
wishes = st.sampled_from([None, None, False, True])
"""No overbooking, or one without and with the patient in two places."""


class Booking(RuleBasedStateMachine):
    """One clinic, two who see patients, one room that both need, and a clock that goes when it is told to."""

    visits = Bundle("visits")

    @initialize()
    def open(self):
        self.now = MONDAY
        self.rows = []  # (holder, no, lane, first, last, expires)
        self.known = {}  # what the clients were told: id -> (status, doctor, patient, minute, overbooked)
        self.row = {}
        self.told = Counter()

    # -- what the database and the servicer do ------------------------------------------------------------------------

    def candidates(self, place, patient, own):
        spans = {place.practitioner_id: (BEFORE, AFTER), "room": (BEFORE, AFTER), patient: (0, 0)}
        kinds = {place.practitioner_id: "practitioner", "room": "exam-room", patient: "patient"}
        for ref, (before, after) in spans.items():
            first, last = place.start - 60 * before, place.start + 60 * (DURATION + after)
            there = [
                row for row in self.rows
                if row[1] == PEOPLE[ref] and row[3] < last and row[4] > first and row[0] != own
            ]  # fmt: skip
            live = frozenset(row[2] for row in there if row[5] is None or row[5] > self.now)
            stale = any(row[5] is not None and row[5] <= self.now for row in there)
            yield Candidate(kinds[ref], ref, PEOPLE[ref], live, stale)

    def choose(self, doctor, patient, minute, overlap, own=""):
        place = Place("visit", "clinic", doctor, int(MONDAY.timestamp()) + 60 * minute)
        found = Found(
            place,
            VisitType(
                id="visit", active=True, duration_minutes=DURATION, buffer_before_minutes=BEFORE,
                buffer_after_minutes=AFTER, modality="IN_PERSON", resource_kinds=["exam-room"], overbooking_cap=CAP,
                late_cancel_hours=24, minimum_notice_minutes=0, security_labels=[],
            ),
            Clinic(status="ACTIVE", time_zone="America/New_York", holiday_region="", closed_dates=[], security_labels=[]),
            Practitioner(active=True, roles=[{"clinic_id": "clinic"}]),
            Schedule(weekly_hours=ALL_WEEK, exceptions=[]),
            list(self.candidates(place, patient, own)),
            weekly=weekly(ALL_WEEK, "schedule"),
        )  # fmt: skip
        found.check(0, 0, STAFF)
        overbooking = None if overlap is None else Overbooking("model", overlap, True)
        return Chosen(found, found.choose(overbooking), [])

    def take(self, visit, chosen, expires=None):
        """What the constraint would let in: the range of a number's lane once, whoever holds it."""
        self.end_stale(chosen)
        self.rows = [row for row in self.rows if row[0] != visit.id]
        for one, lane in chosen.lanes.items():
            span = chosen.found.span(one, lane)
            assert not [
                row for row in self.rows if row[1:3] == (span.no, span.lane) and row[3] < span.end and row[4] > span.start
            ], "the constraint refuses it: a free lane was none"  # fmt: skip
            self.rows.append((visit.id, span.no, span.lane, span.start, span.end, expires))

    def end_stale(self, chosen):
        wanted = [chosen.found.span(one, lane) for one, lane in chosen.lanes.items() if one.stale]
        for holder in {
            row[0] for row in self.rows for span in wanted
            if row[1] == span.no and row[3] < span.end and row[4] > span.start and row[5] and row[5] <= self.now
        }:  # fmt: skip
            self.end(self.row[holder])

    def end(self, visit):
        visit.expire()
        self.rows = [row for row in self.rows if row[0] != visit.id]
        self.acknowledge(visit)

    def acknowledge(self, visit, **known):
        """I2: each change that is kept tells exactly one event."""
        told = visit.__dict__.pop("_told", [])
        assert len(told) == 1, [one.type for one in told]
        self.told[visit.id] += 1
        before = self.known.get(visit.id, SimpleNamespace())
        self.known[visit.id] = SimpleNamespace(**{**before.__dict__, "status": visit.status, **known})

    # -- the oracle ----------------------------------------------------------------------------------------------------

    def stands(self, known):
        return known.status in STANDING and (known.expires is None or known.expires > self.now)

    def busy(self, doctor, patient, minute, own=""):
        """(what a booking would share, whether the patient is elsewhere), minute by minute."""
        mine = set(range(minute - BEFORE, minute + DURATION + AFTER))
        shared, elsewhere = set(), False
        for holder, known in self.known.items():
            if holder == own or not self.stands(known):
                continue
            theirs = set(range(known.minute - BEFORE, known.minute + DURATION + AFTER))
            if mine & theirs:
                shared.add(holder)  # the doctor's, or the one room's
            if known.patient == patient and abs(known.minute - minute) < DURATION:
                elsewhere = True
        return shared, elsewhere

    def judge(self, doctor, patient, minute, overlap, own=""):
        """What a client must hear; None where it depends on how those who are there share the time."""
        shared, elsewhere = self.busy(doctor, patient, minute, own)
        if shared and overlap is None:
            return "SLOT_TAKEN"
        if elsewhere and not overlap:
            # With an overbooking the cap comes first.
            return "PATIENT_BUSY" if not shared else None
        return "" if not shared else None

    def attempt(self, expected, work):
        try:
            work()
        except Problem as problem:
            assert expected != "", f"refused with {problem.reason}, though all is free"
            if expected:
                assert problem.reason == expected
            else:
                assert problem.reason in ("OVERBOOKING_CAP_REACHED", "PATIENT_BUSY")
            return False
        assert not expected, f"let in, though {expected}"
        return True

    # -- what clients do -----------------------------------------------------------------------------------------------

    def new(self, doctor, patient, minute, overlap, *, hold):
        visit = Appointment(
            id=f"visit-{len(self.known)}-{len(self.row)}", tenant_id="t", patient_id=patient, history=[], version=1
        )
        until = self.now + timedelta(minutes=HELD) if hold else None

        def work():
            chosen = self.choose(doctor, patient, minute, overlap)
            visit.place(**chosen.values())
            visit.hold(until) if hold else visit.book()
            self.take(visit, chosen, until)

        if not self.attempt(self.judge(doctor, patient, minute, overlap), work):
            return multiple()
        self.row[visit.id] = visit
        self.acknowledge(visit, doctor=doctor, patient=patient, minute=minute, over=overlap is not None, expires=until)
        return visit

    @rule(target=visits, doctor=doctors, patient=patients, minute=minutes)
    def hold(self, doctor, patient, minute):
        return self.new(doctor, patient, minute, None, hold=True)

    @rule(target=visits, doctor=doctors, patient=patients, minute=minutes, overlap=wishes)
    def create(self, doctor, patient, minute, overlap):
        return self.new(doctor, patient, minute, overlap, hold=False)

    @rule(visit=visits)
    def book(self, visit):
        known = self.known[visit.id]
        mine = [row for row in self.rows if row[0] == visit.id and (row[5] is None or row[5] > self.now)]
        if visit.status is Status.PENDING and len(mine) == len(visit.participants):
            assert self.stands(known)
            visit.book()
            self.rows = [(*row[:5], None) if row[0] == visit.id else row for row in self.rows]
            self.acknowledge(visit, expires=None)
        else:
            assert known.status is not Status.PENDING or not self.stands(known), "a hold that stands was not booked"

    @rule(visit=visits, doctor=doctors, minute=minutes, overlap=wishes)
    def reschedule(self, visit, doctor, minute, overlap):
        if visit.status is not Status.BOOKED:
            with pytest.raises(Problem):
                visit.lifecycle.arrow("reschedule", visit.status)
            return

        def work():
            chosen = self.choose(doctor, visit.patient_id, minute, overlap, visit.id)
            visit.reschedule("", **chosen.values())
            self.take(visit, chosen)

        if self.attempt(self.judge(doctor, visit.patient_id, minute, overlap, visit.id), work):
            self.acknowledge(visit, doctor=doctor, minute=minute, over=overlap is not None)

    @rule(visit=consumes(visits), code=st.sampled_from(["pat", "prov", "pat-lt"]))
    def cancel(self, visit, code):
        if visit.status not in STANDING:
            with pytest.raises(Problem):
                visit.cancel({"code": code}, self.now)
            return
        visit.cancel({"code": code}, self.now)
        self.rows = [row for row in self.rows if row[0] != visit.id]
        self.acknowledge(visit)

    @rule(passed=st.sampled_from([1, 10, 25]), swept=st.booleans())
    def wait(self, passed, swept):
        self.now += timedelta(minutes=passed)
        if swept:
            for visit in self.row.values():
                if visit.status is Status.PENDING and visit.hold_expire_time <= self.now:
                    self.end(visit)

    # -- what must hold after each step --------------------------------------------------------------------------------

    @invariant()
    def i1_no_two_share_a_time_unless_one_of_them_was_overbooked(self):
        standing = [(holder, known) for holder, known in self.known.items() if self.stands(known)]
        for number, (_, one) in enumerate(standing):
            for _, other in standing[number + 1 :]:
                apart = abs(one.minute - other.minute)
                if apart < DURATION + BEFORE + AFTER:  # the one room
                    assert one.over or other.over
                if one.patient == other.patient and apart < DURATION:
                    assert one.over or other.over

    @invariant()
    def i1_never_more_at_once_than_the_cap_allows(self):
        for at in range(595, 760, 5):
            there = [
                known for known in self.known.values()
                if self.stands(known) and known.minute - BEFORE <= at < known.minute + DURATION + AFTER
            ]  # fmt: skip
            assert len(there) <= CAP + 1

    @invariant()
    def a_time_under_an_overbooked_visit_is_never_free(self):
        for known in list(self.known.values()):
            if self.stands(known):
                with pytest.raises(Problem) as taken:
                    self.choose(known.doctor, "pat-none", known.minute, None)
                assert taken.value.reason == "SLOT_TAKEN"

    @invariant()
    def i6_what_was_acknowledged_is_there(self):
        for holder, known in self.known.items():
            visit = self.row[holder]
            assert (visit.status, visit.practitioner_id, visit.patient_id) == (
                known.status,
                known.doctor,
                known.patient,
            )
            assert visit.start_time == MONDAY + timedelta(minutes=known.minute)

    @invariant()
    def i8_each_step_is_in_the_history(self):
        for holder, visit in self.row.items():
            assert len(visit.history) == self.told[holder]
            assert visit.history[-1]["to_status"] == visit.status.name
            for before, after in zip(visit.history, visit.history[1:], strict=False):
                assert before["to_status"] == after["from_status"]


PEOPLE["pat-none"] = 99
Booking.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_booking_in_any_order = Booking.TestCase
