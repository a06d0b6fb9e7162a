"""Calendars of other systems, read row by row: what each row means, and why some can't be sent."""

import tracemalloc
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from system.importing.bundles import NPI, SYNTHEA
from system.importing.visits_file import FileBroken, Reading, VisitRow, read_visits

HEADER = "identifier,patient,practitioner,clinic,visit_type,start,end,status\n"
WHO = {"patient": "7", "practitioner": "5", "clinic": "main", "visit_type": "follow-up"}
EASTERN = """BEGIN:VTIMEZONE
TZID:Office Time
BEGIN:STANDARD
DTSTART:20241103T020000
RRULE:FREQ=YEARLY;BYMONTH=11;BYDAY=1SU
TZOFFSETFROM:-0400
TZOFFSETTO:-0500
END:STANDARD
BEGIN:DAYLIGHT
DTSTART:20240310T020000
RRULE:FREQ=YEARLY;BYMONTH=3;BYDAY=2SU
TZOFFSETFROM:-0500
TZOFFSETTO:-0400
END:DAYLIGHT
END:VTIMEZONE
"""


def reading(**more: Any) -> Reading:
    return Reading("old", **{"today": date(2027, 1, 4), **more})


def from_csv(folder: Path, text: str, **more: Any) -> list[VisitRow]:
    file = folder / "visits.csv"
    file.write_text(text, encoding="utf-8")
    return list(read_visits(file, reading(**more)))


def from_ics(folder: Path, *items: str, before: str = "", **more: Any) -> list[VisitRow]:
    file = folder / "visits.ics"
    events = "".join(f"BEGIN:VEVENT\nUID:u\n{item.strip()}\nEND:VEVENT\n" for item in items)
    text = f"BEGIN:VCALENDAR\nVERSION:2.0\nPRODID:-//x\n{before}{events}END:VCALENDAR\n"
    file.write_text(text.replace("\n", "\r\n"), encoding="utf-8")
    return list(read_visits(file, reading(**{"values": WHO, **more})))


def whys(rows: list[VisitRow]) -> list[tuple[int, str, str]]:
    return [(row.line, row.refusal.reason, row.refusal.field) for row in rows if row.refusal]


def test_a_line_says_whom_it_is_about_by_the_identifiers_of_other_systems(tmp_path: Path) -> None:
    line = "A1,7,5,main,follow-up,2027-03-02 09:00,2027-03-02 09:20,\n"
    (row,) = from_csv(tmp_path, HEADER + line)
    assert (row.line, row.refusal) == (2, None)
    assert row.record == {
        "sourceSystem": "old", "identifier": "A1", "visitTypeCode": "follow-up", "status": "BOOKED", "source": "INTEGRATION",
        "patientIdentifier": {"system": SYNTHEA, "value": "7"}, "practitionerIdentifier": {"system": NPI, "value": "5"},
        "clinicIdentifier": {"system": SYNTHEA, "value": "main"},
        "localStartTime": "2027-03-02T09:00:00", "localEndTime": "2027-03-02T09:20:00",
    }  # fmt: skip


def test_columns_go_by_the_files_own_names_and_what_it_lacks_is_said_once(tmp_path: Path) -> None:
    (row,) = from_csv(
        tmp_path, "Id,MRN,When\nA1,7,2027-03-02T14:00Z\n",
        columns={"identifier": "Id", "patient": "MRN", "start": "When"},
        values={**WHO, "patient_system": "urn:mrn", "clinic_system": "id", "duration_minutes": "45"},
    )  # fmt: skip
    assert row.record["patientIdentifier"] == {"system": "urn:mrn", "value": "7"}
    assert row.record["clinicId"] == "main" and "clinicIdentifier" not in row.record
    assert (row.record["startTime"], row.record["durationMinutes"]) == ("2027-03-02T14:00:00Z", 45)


def test_each_bad_line_is_refused_by_its_number_and_the_others_are_sent(tmp_path: Path) -> None:
    rows = from_csv(
        tmp_path,
        "identifier,patient,practitioner,clinic,visit_type,start,end,status,time_zone\n"
        "A1,,5,main,follow-up,2027-03-02 09:00,,,\n"
        "A2,7,5,main,follow-up,02.03.2027,,,\n"
        "\n"
        'A3,7,5,main,"follow-\nup",2027-03-02 09:00,,dreamt,\n'
        "A4,7,5,main,follow-up,2027-03-02\n"
        "A5,7,5,main,follow-up,2027-03-02 09:00,,,Mars/Olympus\n"
        "A6,7,5,main,follow-up,2027-03-02 09:00,,no-show,America/Phoenix\n",
    )
    assert whys(rows) == [
        (2, "VALUE_MISSING", "patient"), (3, "START_INVALID", "start"), (5, "STATUS_UNKNOWN", "status"),
        (7, "COLUMNS_DIFFER", ""), (8, "TIME_ZONE_UNKNOWN", "time_zone"),
    ]  # fmt: skip
    assert rows[-1].record["startTime"] == "2027-03-02T16:00:00Z" and rows[-1].record["status"] == "NOSHOW"
    assert "dreamt" not in str(whys(rows)) + "".join(row.refusal.what for row in rows if row.refusal)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", b"", "line 1: has no column for identifier"),
        ("a.csv", b"identifier,patient\n", "has no column for practitioner, clinic, visit_type, start"),
        ("a.csv", HEADER.encode() + b'A1,"7\n', "is no CSV"),
        ("a.csv", HEADER.encode() + b"\xff\xfe\n", "is not text in UTF-8"),
        ("a.ics", b"Hello\n", "line 1: is no iCalendar"),
        ("a.ics", b"BEGIN:VCALENDAR\nBEGIN:VEVENT\nUID:1\n", "line 2: the file ends before its END:VCALENDAR"),
        ("a.ics", b"BEGIN:VCALENDAR\nBEGIN:VEVENT\nBEGIN:VEVENT\nEND:VEVENT\nEND:VCALENDAR\n", "line 2: this VEVENT has no end"),
        ("a.ics", b"BEGIN:VCALENDAR\nEND:VCALENDAR\n", "holds no VEVENT"),
        ("a.txt", b"", "ends in .csv or .ics"),
    ],
)  # fmt: skip
def test_what_is_no_calendar_is_refused_whole_with_its_line(
    tmp_path: Path, name: str, content: bytes, why: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(FileBroken) as broken:
        list(read_visits(file, reading()))
    assert why in str(broken.value)
    with pytest.raises(FileBroken, match="No such file"):
        list(read_visits(tmp_path / "none.csv", reading()))


def test_items_in_utc_in_a_zone_and_by_the_clinics_clock(tmp_path: Path) -> None:
    rows = from_ics(
        tmp_path,
        "DTSTART:20270302T140000Z\nDTEND:20270302T143000Z",
        "DTSTART;TZID=America/New_York:20270302T090000\nDURATION:PT45M",
        "DTSTART:20270302T090000\nDTEND:20270302T093000\nX-CARE-PATIENT:9",
        "DTSTART;TZID=Office Time:20270702T090000\nSTATUS:CANCELLED",
        "DTSTART;TZID=America/New_York:20270314T023000",
        "DTSTART;TZID=America/New_York:20271107T013000",
        before=EASTERN,
    )
    assert whys(rows) == []
    utc, zoned, floating, own, skipped, repeated = (row.record for row in rows)
    assert (utc["startTime"], utc["endTime"]) == ("2027-03-02T14:00:00Z", "2027-03-02T14:30:00Z")
    assert (zoned["startTime"], zoned["durationMinutes"]) == ("2027-03-02T14:00:00Z", 45)
    assert (floating["localStartTime"], floating["localEndTime"]) == ("2027-03-02T09:00:00", "2027-03-02T09:30:00")
    assert floating["patientIdentifier"]["value"] == "9"
    assert (own["startTime"], own["status"]) == ("2027-07-02T13:00:00Z", "CANCELLED")
    assert skipped["startTime"] == "2027-03-14T07:30:00Z"  # moves forward by the gap
    assert repeated["startTime"] == "2027-11-07T05:30:00Z"  # the first of two


def test_items_that_are_no_visits_are_refused_by_the_line_where_they_begin(tmp_path: Path) -> None:
    rows = from_ics(
        tmp_path,
        "DTSTART;VALUE=DATE:20270302",
        "DTSTART;TZID=Nowhere:20270302T090000",
        "SUMMARY:no start",
        "DTSTART:20270302T090000\nSTATUS:TENTATIVE",
        "DTSTART:20270302T090000\nRRULE:FREQ=WEEKLY",
        "DTSTART:20270302T090000\nRRULE:FREQ=DAILY;COUNT=500",
        "DTSTART:20270302T090000\nRRULE:FREQ=SECONDLY;COUNT=2",
        "DTSTART:20270302T090000Z\nDTEND:20270302T093000",
        "DTSTART:2027",
    )
    assert [why for _, why, _ in whys(rows)] == [
        "START_INVALID", "TIME_ZONE_UNKNOWN", "START_INVALID", "STATUS_UNKNOWN", "SERIES_WITHOUT_END",
        "TOO_MANY_OCCURRENCES", "RULE_INVALID", "END_INVALID", "ITEM_INVALID",
    ]  # fmt: skip
    assert [row.line for row in rows[:3]] == [4, 8, 12]


@pytest.mark.parametrize(
    ("cells", "reason", "field"),
    [
        ("0001-01-01T00:00+14:00,,", "START_INVALID", "start"),
        ("9999-12-31T23:59-10:00,,", "START_INVALID", "start"),
        ("2027-03-02 09:00,9999-12-31 23:59,", "END_INVALID", "end"),
        ("2027-03-02 09:00,," + "9" * 5000, "END_INVALID", "duration_minutes"),
    ],
)
def test_a_line_of_never_or_of_no_number_is_refused_and_the_next_is_read(
    tmp_path: Path, cells: str, reason: str, field: str
) -> None:
    """Exports write 0001-01-01 or 9999-12-31 for what they don't know: one such line ended the whole run."""
    header = "identifier,patient,practitioner,clinic,visit_type,start,end,duration_minutes\n"
    after = "A2,7,5,main,follow-up,2027-03-02 09:00,,\n"
    text = f"{header}A1,7,5,main,follow-up,{cells}\n{after}"
    rows = from_csv(tmp_path, text, values={"time_zone": "America/New_York"})
    assert whys(rows) == [(2, reason, field)] and rows[1].refusal is None


@pytest.mark.parametrize(
    ("item", "reason", "field"),
    [
        ("DTSTART:20270301T090000Z\nDURATION:PT1H\nDURATION:PT2H", "END_INVALID", "DURATION"),
        ("DTSTART:20270301T090000Z\nDURATION;VALUE=TEXT:PT1H", "END_INVALID", "DURATION"),
        ("DTSTART:20270301T090000Z\nDURATION;VALUE=DATE-TIME:20270301T090000Z", "END_INVALID", "DURATION"),
        ("DTSTART;VALUE=TEXT:soon", "START_INVALID", "DTSTART"),
        ("DTSTART;TZID=Asia/Tokyo:00010101T000000", "START_INVALID", "start"),
        ("DTSTART;TZID=America/New_York:20270301T090000\nDTEND;TZID=America/New_York:99991231T235959", "END_INVALID", "end"),
        ("DTSTART:20270301T090000Z\nRECURRENCE-ID:soon", "ITEM_INVALID", ""),
        ("DTSTART:20270301T090000Z\nRECURRENCE-ID;VALUE=DATE:20270301", "ITEM_INVALID", "RECURRENCE-ID"),
        ("DTSTART:20270301T090000Z\nRECURRENCE-ID:20270301T090000Z\nRECURRENCE-ID:20270302T090000Z", "ITEM_INVALID", "RECURRENCE-ID"),
        ("DTSTART:20270301T090000Z\nRRULE:FREQ=DAILY;COUNT=3\nEXDATE;VALUE=DATE:20270302", "RULE_INVALID", "EXDATE"),
        ("DTSTART:20270301T090000Z\nRRULE:FREQ=DAILY;COUNT=3\nEXDATE:20270302T090000", "RULE_INVALID", "EXDATE"),
    ],
)  # fmt: skip
def test_an_item_whose_times_mean_nothing_is_refused_and_the_next_is_read(
    tmp_path: Path, item: str, reason: str, field: str
) -> None:
    """A day in place of a time fits no visit of a rule: what was called off there would have been booked here."""
    rows = from_ics(tmp_path, item, "DTSTART:20270401T090000Z")
    assert whys(rows) == [(4, reason, field)] and rows[1].refusal is None


def test_a_rule_stands_for_each_of_its_visits_by_the_local_clock(tmp_path: Path) -> None:
    """Over the clock change 09:00 stays 09:00; what was moved, cancelled or left out isn't there twice."""
    rows = from_ics(
        tmp_path,
        "DTSTART;TZID=America/New_York:20270301T090000\nDTEND;TZID=America/New_York:20270301T093000\n"
        "RRULE:FREQ=WEEKLY;COUNT=5\nEXDATE;TZID=America/New_York:20270308T090000",
        "RECURRENCE-ID:20270315T130000Z\nDTSTART;TZID=America/New_York:20270316T100000",
        "RECURRENCE-ID;TZID=America/New_York:20270322T090000\nSTATUS:CANCELLED\n"
        "DTSTART;TZID=America/New_York:20270322T090000",
    )
    assert whys(rows) == []
    assert [(row.number, row.record["startTime"], row.record["status"]) for row in rows] == [
        (1, "2027-03-01T14:00:00Z", "BOOKED"), (5, "2027-03-29T13:00:00Z", "BOOKED"),
        (0, "2027-03-16T14:00:00Z", "BOOKED"), (0, "2027-03-22T13:00:00Z", "CANCELLED"),
    ]  # fmt: skip
    assert [row.record["identifier"] for row in rows] == [
        "u/20270301T140000Z", "u/20270329T130000Z", "u/20270315T130000Z", "u/20270322T130000Z",
    ]  # fmt: skip
    assert {row.record.get("durationMinutes") for row in rows[:2]} == {30}


def test_a_rule_without_an_end_goes_on_until_the_day_that_is_given(tmp_path: Path) -> None:
    endless = "DTSTART:20270301T090000\nRRULE:FREQ=WEEKLY"
    rows = from_ics(tmp_path, endless, until=date(2027, 3, 22))
    assert [row.record["localStartTime"][:10] for row in rows] == [
        "2027-03-01",
        "2027-03-08",
        "2027-03-15",
        "2027-03-22",
    ]
    assert whys(from_ics(tmp_path, endless, until=date(2031, 1, 1))) == [(4, "SERIES_TOO_LONG", "RRULE")]


@pytest.mark.parametrize("suffix", ["csv", "ics"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    def peak(count: int) -> int:
        file = tmp_path / f"{count}.{suffix}"
        if suffix == "csv":
            file.write_text(HEADER + "".join(f"A{n},7,5,main,x,2027-03-02 09:00,,\n" for n in range(20 * count)))
        else:
            items = "".join(f"BEGIN:VEVENT\nUID:{n}\nDTSTART:20270302T090000\nEND:VEVENT\n" for n in range(count))
            file.write_text(f"BEGIN:VCALENDAR\n{items}END:VCALENDAR\n")
        tracemalloc.start()
        rows = sum(row.refusal is None for row in read_visits(file, reading(values=WHO)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows == (20 * count if suffix == "csv" else count)
        return most

    peak(10)
    assert peak(500) < 1.5 * peak(50) + 200_000
