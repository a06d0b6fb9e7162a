"""Booking in any order, asked of the service itself: after each step what was acknowledged, told and audited is there.

Loops stand still and run when a step says so: a hold is over when it is said to be. What may be let in and what not is the
other model's matter (test_booking_model.py).
"""

import asyncio
import json
import random
from collections import Counter
from datetime import UTC, timedelta
from types import SimpleNamespace

import asyncpg
import hypothesis
import pytest
from care.scheduling.v1 import appointments_pb2 as pb
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from joserfc.jwk import KeySet

from chassis.auditing import verify
from chassis.bus.postgres import PostgresBus
from chassis.errors import Problem
from chassis.testing.harness import Harness
from services.scheduling.appointment import Status
from services.scheduling.backfill import backfill
from services.scheduling.expiry import expire_holds
from services.scheduling.service import SERVICE
from services.scheduling.tests.desk import soon
from services.scheduling.tests.replica import seeded
from services.scheduling.tests.test_booking_races import CROOKED
from services.scheduling.tests.waiting import ALWAYS_OPEN, WAITING, WaitingDesk

OVER = (
    "WITH rows AS (UPDATE occupancy SET expire_time = clock_timestamp() - interval '1 s' WHERE holder_id = :id)"
    " UPDATE appointment SET hold_expire_time = clock_timestamp() - interval '1 s' WHERE id = :id"
)
STANDING = (
    "SELECT practitioner_id::text AS doctor, start_time, end_time FROM appointment"
    " WHERE practitioner_id = ANY(CAST(:doctors AS uuid[])) AND (status = 'BOOKED'"
    " OR (status = 'PENDING' AND hold_expire_time > clock_timestamp()))"
)
NOTED = (
    "SELECT method, outcome, count(*) AS n FROM audit WHERE actor LIKE 'staff:%'"
    " AND subject_ids && CAST(:patients AS uuid[]) GROUP BY 1, 2"
)
TOLD = "SELECT key, count(DISTINCT value) AS n FROM log WHERE key = ANY($1) GROUP BY key"
OWN_CROOKED = f"{CROOKED} AND a.patient_id = ANY(CAST(:patients AS uuid[]))"
GONE = {"SLOT_TAKEN", "PATIENT_BUSY", "HOLD_EXPIRED", "ILLEGAL_TRANSITION", "OVERBOOKING_CAP_REACHED"}
CLOSED = {"WAITLIST_ENTRY_EXISTS", "OFFER_EXPIRED", "OFFER_ANSWERED"}
one_of_two, one_of_three, times = st.integers(0, 1), st.integers(0, 2), st.integers(0, 5)


class Kept(RuleBasedStateMachine):
    """Two who see patients, three patients, six starts that overlap, and a waitlist."""

    visits = Bundle("visits")
    all_heard = Counter()
    desk = server = runtime = log = keys = loop = None

    def on(self, work):
        """What the service's loop makes of it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    @initialize()
    def open(self):
        self.known, self.offers, self.heard, self.entries = {}, {}, Counter(), set()
        self.on(self._open())

    async def _open(self):
        desk = self.desk
        number = len(await desk.sql("SELECT 1 FROM visit_type"))
        self.kind = await desk.a_visit_type(f"kept-{number}", overbooking_cap=1)
        self.doctors = [await desk.a_practitioner(f"Kept {number} {each}") for each in range(2)]
        self.patients = [await desk.a_patient() for _ in range(3)]
        self.start = soon(days=5)
        found = await desk.search(
            self.kind, practitioner_ids=self.doctors, start_time=self.start, end_time=self.start + timedelta(hours=2)
        )
        self.slots = {(one.practitioner_id, one.start_time.seconds): one for one in found.slots}

    def at(self, number):
        return self.start + timedelta(minutes=15 * number)

    def ask(self, method, call):
        """A call's answer, or None where it is refused; either is to be in the audit."""
        try:
            answer = self.on(call)
        except Problem as problem:
            assert problem.reason in GONE | CLOSED, problem
            self.note(method, problem.code.name)
            return None
        self.note(method, "OK")
        return answer

    def note(self, *outcome):
        self.heard[outcome] += 1
        self.all_heard[outcome] += 1

    def keep(self, visit):
        if visit is None:
            return multiple()
        self.known[visit.id] = SimpleNamespace(
            status=Status[pb.Appointment.Status.Name(visit.status)],
            doctor=visit.practitioner_id,
            start=visit.start_time.seconds,
            over=False,
        )
        return visit.id

    # -- what is done --------------------------------------------------------------------------------------------------

    @rule(target=visits, doctor=one_of_two, patient=one_of_three, time=times)
    def hold(self, doctor, patient, time):
        slot = self.slots[self.doctors[doctor], round(self.at(time).timestamp())]
        return self.keep(
            self.ask("HoldAppointment", self.desk.hold(self.patients[patient], slot, "mona", hold_seconds=3600))
        )

    @rule(target=visits, doctor=one_of_two, patient=one_of_three, time=times, over=st.booleans())
    def create(self, doctor, patient, time, over):
        more = {"overbooking": {"reason": "model"}} if over else {}
        booking = self.desk.book(
            self.patients[patient], self.at(time), self.doctors[doctor], "mona", visit_type_id=self.kind, **more
        )
        return self.keep(self.ask("CreateAppointment", booking))

    @rule(visit=visits)
    def book(self, visit):
        if (answer := self.ask("BookAppointment", self.desk.do("Book", visit, "mona"))) is not None:
            assert not self.known[visit].over, "who was late got back in"
            self.keep(answer)

    @rule(visit=visits, doctor=one_of_two, time=times)
    def reschedule(self, visit, doctor, time):
        moving = self.desk.move(SimpleNamespace(id=visit), self.at(time), "mona", practitioner_id=self.doctors[doctor])
        if (answer := self.ask("RescheduleAppointment", moving)) is not None:
            self.keep(answer)

    @rule(visit=visits)
    def cancel(self, visit):
        answer = self.ask("CancelAppointment", self.desk.do("Cancel", visit, "mona", reason={"code": "pat"}))
        if answer is not None:
            self.keep(answer)

    @rule(visit=visits, swept=st.booleans())
    def expire(self, visit, swept):
        if self.known[visit].status is Status.PENDING:
            self.known[visit].over = True
            self.on(self.desk.sql(OVER, id=visit))
        if swept:
            self.on(expire_holds(self.runtime))

    @rule(patient=one_of_three)
    def enlist(self, patient):
        entry = self.ask("CreateWaitlistEntry", self.desk.enlist(self.patients[patient], self.kind))
        if entry is not None:
            self.entries.add(entry.id)

    @precondition(lambda self: self.entries)
    @rule()
    def match(self):
        self.on(backfill(self.runtime))
        for row in self.on(
            self.desk.sql(
                "SELECT o.id::text, a.practitioner_id::text AS doctor, a.start_time FROM waitlist_offer o"
                " JOIN appointment a ON a.id = o.id WHERE o.status = 'OPEN' AND a.status = 'PENDING'"
                " AND o.entry_id = ANY(CAST(:ids AS uuid[]))",
                ids=list(self.entries),
            )
        ):
            self.offers[row.id] = row

    @precondition(lambda self: self.offers)
    @rule(accepted=st.booleans())
    def answer(self, accepted):
        offer_id, row = self.offers.popitem()
        method = "AcceptWaitlistOffer" if accepted else "DeclineWaitlistOffer"
        answer = self.ask(method, (self.desk.accept if accepted else self.desk.decline)(offer_id))
        if answer is not None and accepted:
            self.known[offer_id] = SimpleNamespace(
                status=Status.BOOKED, doctor=row.doctor, start=round(row.start_time.timestamp()), over=False
            )

    # -- what must hold after each step --------------------------------------------------------------------------------

    @invariant()
    def i1_nothing_overlaps_and_no_row_is_missing_or_left_over(self):
        # Of this walk's own: what a walk that failed left behind must not fail the one that shows how.
        assert not [row for row in self.on(self.desk.overlaps()) if str(row[0]) in self.known]
        assert not self.on(self.desk.sql(OWN_CROOKED, patients=self.patients))

    @invariant()
    def i2_each_change_is_told_once(self):
        self.on(self._told())

    async def _told(self):
        steps = {
            row.id: row.steps
            for table in ("appointment", "waitlist_entry")
            for row in await self.desk.sql(
                f"SELECT id::text, jsonb_array_length(history) AS steps FROM {table}"
                " WHERE patient_id = ANY(CAST(:patients AS uuid[]))",
                patients=self.patients,
            )
        }
        async with asyncio.timeout(10):
            while True:
                told = {row["key"]: row["n"] for row in await self.log.fetch(TOLD, list(steps))}
                assert all(told[key] <= steps[key] for key in told), "told more than was done"
                if told == steps:
                    return
                await asyncio.sleep(0.01)

    @invariant()
    def a_search_shows_what_is_free_and_nothing_else(self):
        self.on(self._shown())

    async def _shown(self):
        window = {"start_time": self.start, "end_time": self.at(8), "practitioner_ids": self.doctors, "page_size": 200}
        found = await self.desk.search(self.kind, **window)
        taken = await self.desk.sql(STANDING, doctors=self.doctors)
        free = {
            (doctor, self.at(number))
            for doctor in self.doctors
            for number in range(8)
            if not any(
                one.doctor == doctor and one.start_time < self.at(number + 2) and one.end_time > self.at(number)
                for one in taken
            )
        }
        assert {(one.practitioner_id, one.start_time.ToDatetime(tzinfo=UTC)) for one in found.slots} == free

    @invariant()
    def i6_what_was_acknowledged_is_there(self):
        rows = self.on(
            self.desk.sql(
                "SELECT id::text, status, practitioner_id::text AS doctor, start_time FROM appointment"
                " WHERE id = ANY(CAST(:ids AS uuid[]))",
                ids=list(self.known),
            )
        )
        assert {row.id for row in rows} == set(self.known)
        for row in rows:
            known = self.known[row.id]
            assert (row.doctor, round(row.start_time.timestamp())) == (known.doctor, known.start)
            assert row.status == known.status.name or (known.over and row.status == "CANCELLED")

    @invariant()
    def i8_each_call_is_in_the_audit_and_the_chain_is_whole(self):
        self.on(self._audited())

    async def _audited(self):
        rows = await self.desk.sql(NOTED, patients=self.patients)
        noted = Counter({(row.method.rpartition("/")[2], row.outcome): row.n for row in rows if row.n})
        assert {key: n for key, n in noted.items() if key[0] in _WRITES} == dict(self.heard)
        while await self.server.sealer.seal():
            pass
        verdict = await verify(self.desk.database.engine, self.server.settings.audit_checkpoint_file, self.keys)
        assert (verdict.broken, verdict.unsealed) == ("", 0)


_WRITES = {
    "HoldAppointment", "CreateAppointment", "BookAppointment", "RescheduleAppointment", "CancelAppointment",
    "CreateWaitlistEntry", "AcceptWaitlistOffer", "DeclineWaitlistOffer",
}  # fmt: skip


@pytest.fixture(scope="module")
async def kept(database):
    bus_url = await database("bus")
    harness = Harness(database, PostgresBus(bus_url))
    await harness.start(SERVICE, principal_cache=60.0, max_connection_age=3600.0, **ALWAYS_OPEN)
    desk = await WaitingDesk(harness, bus_url).open()
    await harness.staff("mona", [*WAITING, "appointments.overbook"], clinics=[desk.clinic])
    server = harness.servers["scheduling"]
    for running in server.runtime.loops.values():
        await running.stop()
    log = await asyncpg.connect(desk._bus_url)
    keys = KeySet.import_key_set(json.loads(harness.services_file.read_text()))
    yield {"desk": desk, "server": server, "runtime": server.runtime, "log": log, "keys": keys}
    await log.close()
    await harness.stop()


async def walk(kept, examples, steps, seed):
    """So many walks of so many steps, from a thread of their own: the service has this one's loop."""
    heard = Counter()
    model = type("Walk", (Kept,), {**kept, "all_heard": heard, "loop": asyncio.get_running_loop()})
    how = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    await asyncio.to_thread(run_state_machine_as_test, hypothesis.seed(seed)(model), settings=how)
    print({f"{method} {outcome}": n for (method, outcome), n in sorted(heard.items())})
    return heard


def stroll(model, steps, seed):
    """One walk with a die of its own: Hypothesis begins with the shortest ones, of which a few prove little."""
    dice, walk, visits = random.Random(seed), model(), []
    walk.open()
    for _ in range(steps):
        doctor, patient, time, coin = dice.randrange(2), dice.randrange(3), dice.randrange(6), dice.random() < 0.5
        may = ["hold", "create", "enlist"]
        may += ["book", "reschedule", "cancel", "expire"] if visits else []
        may += ["answer", "answer"] if walk.offers else ["match"] if walk.entries else []
        step, how = dice.choice(may), {}
        if step in ("hold", "create"):
            how = {"doctor": doctor, "patient": patient, "time": time} | ({"over": coin} if step == "create" else {})
        elif step == "enlist":
            how = {"patient": patient}
        elif step == "answer":
            how = {"accepted": coin}
        elif step != "match":
            how = {"visit": dice.choice(visits)}
            how |= {"reschedule": {"doctor": doctor, "time": time}, "expire": {"swept": coin}}.get(step, {})
        made = getattr(walk, step)(**how)
        visits += [made] if isinstance(made, str) else []
        walk.i1_nothing_overlaps_and_no_row_is_missing_or_left_over()
        walk.i2_each_change_is_told_once()
        walk.a_search_shows_what_is_free_and_nothing_else()
        walk.i6_what_was_acknowledged_is_there()
        walk.i8_each_call_is_in_the_audit_and_the_chain_is_whole()


async def test_booking_in_any_order_is_kept_told_and_audited(kept):
    seed, heard = random.randrange(1 << 30), Counter()
    print(f"seed {seed}")
    model = type("Walk", (Kept,), {**kept, "all_heard": heard, "loop": asyncio.get_running_loop()})
    await asyncio.to_thread(stroll, model, 20, seed)
    assert heard.total() > 4


@pytest.mark.soak
async def test_booking_in_any_order_is_kept_told_and_audited_through_a_thousand_steps(kept):
    heard = await walk(kept, examples=25, steps=40, seed=seeded())
    assert {method for method, outcome in heard if outcome == "OK"} == _WRITES
