"""Visits as iCalendar text, read back by programs that had no part in writing it."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import icalendar
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.ids import new_id
from services.scheduling.calendars import Named, Visit, calendar, promised, visit
from services.scheduling.tests.reading import by_dateutil, by_icalendar, by_icaljs

# The nights in which the clock is turned; Phoenix and Sao Paulo have none, so those of New York.
NIGHTS = {
    "America/New_York": ((2026, 11, 1), (2027, 3, 14)),
    "America/Phoenix": ((2026, 11, 1), (2027, 3, 14)),
    "America/Sao_Paulo": ((2026, 11, 1), (2027, 3, 14)),
    "Australia/Lord_Howe": ((2026, 10, 4), (2027, 4, 4)),
}
CLINIC = Named("Riverside", "", (), {"lines": ["12 Main St"], "city": "Boston", "state": "MA", "postal_code": "02110"})
FOLLOW_UP = Named("Follow-up")
DOCTOR = Named("Sam Abara")


def written(start, zone="America/New_York", minutes=30, **more):
    at = datetime(2026, 6, 1, 12, tzinfo=UTC)
    values = dict(id=new_id(), sequence=0, status="CONFIRMED", zone=zone, changed=at, created=at, summary="Visit",
                  location="")  # fmt: skip
    return Visit(**{**values, "start": start, "end": start + timedelta(minutes=minutes), **more})


def a_row(**more):
    start = datetime(2026, 11, 24, 15, tzinfo=UTC)
    values = dict(id=new_id(), status="BOOKED", start_time=start, end_time=start + timedelta(minutes=30),
                  time_zone="America/New_York", modality="IN_PERSON", schedule_version=1, security_labels=[],
                  create_time=start, update_time=start)  # fmt: skip
    return SimpleNamespace(**{**values, **more})


def said(whose="patient", details=False, clinic=CLINIC, kind=FOLLOW_UP, **more):
    one = visit(a_row(**more), clinic, kind, DOCTOR, whose=whose, details=details)
    return one.summary, one.location


@pytest.mark.parametrize("read", [by_icalendar, by_dateutil, by_icaljs])
def test_other_programs_read_the_instants_of_the_rows_through_the_nights_in_which_clocks_are_turned(read):
    """Reported elsewhere, DST: YosemiteCrew#3140 (offset taken at 1970), nextcloud/calendar#6407 (one day off),
    GINNOV/poligest#18 (19:00 sent at 20:30); zone of whom, Bahmni#201: each visit stands in its clinic's own."""
    visits = [
        written(datetime(*night, tzinfo=ZoneInfo(zone)).astimezone(UTC) + timedelta(minutes=30 * number), zone)
        for zone, nights in NIGHTS.items()
        for night in nights
        for number in range(-4, 20)
    ]
    # 19:00 in winter and summer, whatever the offset was in 1970.
    visits += [
        written(datetime(2027, month, 15, 19, tzinfo=ZoneInfo(zone)).astimezone(UTC), zone)
        for zone in NIGHTS
        for month in (1, 7)
    ]
    found = {one["uid"]: (one["start"], one["end"]) for one in read(calendar(visits))}
    assert found == {one.id: (round(one.start.timestamp()), round(one.end.timestamp())) for one in visits}


def test_a_time_that_the_clock_shows_twice_is_written_in_utc_and_all_else_by_the_clinics_clock():
    once = datetime(2026, 11, 1, 4, tzinfo=UTC)  # 00:00, before it is turned
    twice = [datetime(2026, 11, 1, hour, 30, tzinfo=UTC) for hour in (5, 6)]  # 01:30 and 01:30 again
    text = calendar([written(at) for at in [once, *twice]])
    assert "DTSTART;TZID=America/New_York:20261101T000000\r\n" in text
    assert "DTSTART:20261101T053000Z\r\n" in text and "DTSTART:20261101T063000Z\r\n" in text


def test_a_zone_is_written_change_by_change_for_the_years_that_are_touched():
    text = calendar([written(datetime(2026, 12, 31, 20, tzinfo=UTC)), written(datetime(2027, 1, 4, 20, tzinfo=UTC))])
    assert text.count("BEGIN:VTIMEZONE") == 1
    assert text.count("BEGIN:DAYLIGHT") == 2 and text.count("BEGIN:STANDARD") == 3
    assert "DTSTART:20270314T020000\r\nTZOFFSETFROM:-0500\r\nTZOFFSETTO:-0400\r\nTZNAME:EDT\r\n" in text
    assert "VTIMEZONE" not in calendar([written(datetime(2026, 12, 31, 20, tzinfo=UTC), "UTC")])


def test_a_move_and_an_end_raise_the_sequence_and_a_check_in_does_not():
    def sequence(**more):
        return visit(a_row(**more), CLINIC, FOLLOW_UP, DOCTOR, whose="patient", details=False).sequence

    steps = [
        {},
        {"schedule_version": 2},
        {"schedule_version": 3},
        {"schedule_version": 3, "status": "CANCELLED"},
    ]
    told = [sequence(**step) for step in steps]
    assert told == sorted(set(told))
    assert sequence(status="CHECKED_IN") == sequence() == sequence(status="PENDING")


def test_a_status_is_one_that_calendars_know():
    def status(name):
        return visit(a_row(status=name), CLINIC, FOLLOW_UP, DOCTOR, whose="clinic", details=False).status

    assert {status(name) for name in ("BOOKED", "ARRIVED", "CHECKED_IN", "FULFILLED", "NOSHOW")} == {"CONFIRMED"}
    assert {status(name) for name in ("CANCELLED", "ENTERED_IN_ERROR")} == {"CANCELLED"}
    assert status("PENDING") == "TENTATIVE"


def test_without_details_nothing_says_what_a_visit_is_for_or_with_whom():
    assert said() == ("Visit, Riverside", "Riverside, 12 Main St, Boston, MA 02110")
    assert said("practitioner") == said("clinic")
    assert said("clinic")[0] == "Visit (in person, 30 min)"
    assert said("clinic", modality="VIDEO") == ("Visit (video, 30 min)", "Video visit")


def test_details_name_the_visit_type_and_the_practitioner_where_nothing_is_labelled():
    assert said(details=True)[0] == "Follow-up with Sam Abara, Riverside"
    assert said("practitioner", details=True)[0] == "Follow-up (in person, 30 min)"
    assert said("clinic", details=True)[0] == "Follow-up, Sam Abara (in person, 30 min)"


@pytest.mark.parametrize("where", ["row", "clinic", "kind"])
def test_what_is_labelled_goes_by_its_discreet_name_and_leaves_out_its_address(where):
    labels = ["SUD"]
    clinic = CLINIC._replace(name="Riverside Addiction Center", labels=labels if where == "clinic" else ())
    kind = FOLLOW_UP._replace(name="Methadone", labels=labels if where == "kind" else ())
    more = {"security_labels": labels} if where == "row" else {}
    for whose in ("patient", "practitioner", "clinic"):
        for details in (False, True):
            summary, location = said(whose, details, clinic, kind, **more)
            assert summary.startswith("Visit") and location == ""
            told = said(whose, details, clinic._replace(discreet_name="Riverside East"), kind, **more)
            assert told[1] == "Riverside East" and not {"Addiction", "Methadone", "Abara", "Main"} & set(
                " ".join(told).replace(",", "").split()
            )


def test_a_hold_that_came_to_nothing_was_never_in_a_calendar():
    assert promised("BOOKED", {"action": "book"}) and promised("PENDING", {"action": "hold"})
    assert promised("CANCELLED", {"action": "cancel", "from_status": "BOOKED"})
    for action, status in (("release", "PENDING"), ("expire", "PENDING"), ("cancel", "PENDING")):
        assert not promised("CANCELLED", {"action": action, "from_status": status})


def test_the_same_rows_give_the_same_text():
    visits = [written(datetime(2026, 11, 24, 15, tzinfo=UTC))]
    assert calendar(visits) == calendar(visits)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n,;:\\"'), max_size=200))
def test_any_words_come_back_as_they_were_in_lines_of_at_most_75_octets(words):
    text = calendar([written(datetime(2026, 11, 24, 15, tzinfo=UTC), summary=words, location=words)])
    *lines, last = text.encode().split(b"\r\n")
    assert last == b"" and all(len(line) <= 75 for line in lines)
    for line in lines:
        line.decode()
        assert b"\r" not in line and b"\n" not in line
    (event,) = icalendar.Calendar.from_ical(text.encode()).walk("VEVENT")
    assert str(event["SUMMARY"]) == words
    assert str(event.get("LOCATION", "")) == words
