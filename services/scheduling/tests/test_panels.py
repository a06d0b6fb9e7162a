"""Trips of several visits: against all combinations tried one by one, and over gRPC."""

from datetime import UTC, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.availability import Slot
from services.scheduling.panels import Step, panels
from services.scheduling.tests.desk import refused

NEW_YORK = ZoneInfo("America/New_York")
MONDAY = datetime(2031, 6, 9, tzinfo=NEW_YORK).astimezone(UTC)

slots = st.lists(
    st.builds(
        lambda start, length, clinic, who, room: Slot(start, clinic, who, start + length, (room,)),
        st.integers(0, 40), st.just(3), st.sampled_from("ab"), st.sampled_from("pq"), st.sampled_from("rs"),
    ),
    max_size=7, unique_by=lambda slot: slot[:3],
).map(sorted)  # fmt: skip
steps = st.builds(Step, st.integers(0, 4), st.integers(4, 15), st.integers(0, 2), st.integers(0, 2))


def together(trip, asked, travel):
    """Whether a trip is one, said as the request says it."""
    for (one, _), (other, step) in zip(
        zip(trip, asked, strict=True), list(zip(trip, asked, strict=True))[1:], strict=False
    ):
        gap = other.start - one.end
        if not max(step.minimum_gap, travel if one.clinic_id != other.clinic_id else 0) <= gap <= step.maximum_gap:
            return False
    for first, one in enumerate(trip):
        for later in range(first + 1, len(trip)):
            other = trip[later]
            shared = one.practitioner_id == other.practitioner_id or one.resource_ids == other.resource_ids
            if shared and other.start - asked[later].before < one.end + asked[first].after:
                return False
    return True


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(slots, steps), min_size=2, max_size=3), st.integers(0, 6))
def test_a_trip_is_found_for_each_first_visit_that_has_one(asked, travel):
    streams, each = [one for one, _ in asked], [step for _, step in asked]
    found = list(panels([iter(one) for one in streams], each, lambda here, there: travel))
    possible = [trip for trip in product(*streams) if together(trip, each, travel)]
    assert all(together(trip, each, travel) for trip in found)
    assert [trip[0] for trip in found] == [slot for slot in streams[0] if any(trip[0] == slot for trip in possible)]
    for trip in found:  # of each further step the earliest
        assert trip == min(one for one in possible if one[0] == trip[0])


def test_only_as_much_of_the_streams_is_pulled_as_the_first_trip_needs():
    pulled = []

    def endless(name):
        for start in range(0, 10**9, 10):
            pulled.append(name)
            yield Slot(start, "c", name, start + 5, ())

    trip = next(panels([endless("p"), endless("q")], [Step(0, 0), Step(0, 20)], lambda here, there: 0))
    assert [slot.start for slot in trip] == [0, 10] and len(pulled) < 12


async def test_the_laboratory_an_hour_before_the_visit_and_both_in_one_trip(desk):
    lab_here, west = await desk.a_visit_type("lab", 15), await desk.a_clinic()
    hours = [{"weekday": day, "start": "08:00", "end": "12:00"} for day in range(1, 6)]
    nurse = await desk.a_practitioner("Nurse", hours)
    doctor = await desk.a_practitioner("After", [{**one, "start": "10:00"} for one in hours])
    far = await desk.a_practitioner("Far", hours, clinic=west)

    def steps(who):
        return (
            {"visit_type_id": lab_here, "practitioner_ids": [nurse]},
            {
                "visit_type_id": desk.visit,
                "practitioner_ids": [who],
                "minimum_gap_minutes": 60,
                "maximum_gap_minutes": 90,
            },
        )

    def clock(trip):
        return [slot.start_time.ToDatetime(tzinfo=UTC).astimezone(NEW_YORK).strftime("%H:%M") for slot in trip.slots]

    window = {"start_time": MONDAY, "end_time": MONDAY + timedelta(days=1), "at_most": 50}
    found = (await desk.panel(*steps(doctor), **window)).panels
    assert clock(found[0]) == ["08:15", "10:00"] and clock(found[-1])[1] == "11:30"
    trips = (await desk.panel(*steps(far), travel_minutes=80, **window)).panels
    assert clock(trips[0]) == ["08:00", "09:45"]  # 80 minutes on the way
    ways = [{"clinic_id": west, "other_clinic_id": desk.clinic, "minutes": 10}]
    trips = (await desk.panel(*steps(far), travel_minutes=80, travels=ways, **window)).panels
    assert clock(trips[0]) == ["08:00", "09:15"]
    patient = await desk.a_patient()
    for slot in found[0].slots:
        assert (await desk.hold(patient, slot)).id
    assert clock((await desk.panel(*steps(doctor), **window)).panels[0]) == ["08:45", "10:30"]
    wrong = {"visit_type_id": desk.visit, "minimum_gap_minutes": 300}
    assert await refused(desk.panel(wrong, wrong)) == "GAP_INVALID"
    assert (
        await refused(desk.panel(*steps(doctor), start_time=MONDAY, end_time=MONDAY + timedelta(days=40)))
        == "WINDOW_TOO_LONG"
    )
