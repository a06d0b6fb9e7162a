"""Rules against a second expansion by plain date arithmetic, in zones whose clocks change in every way there is."""

import calendar
import time as clocks
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from dateutil.relativedelta import relativedelta
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from chassis.errors import Invalid
from services.scheduling import recurrence
from services.scheduling.availability import LocalClock

NEW_YORK = ZoneInfo("America/New_York")
ZONES = (
    "America/New_York", "America/Phoenix", "Pacific/Honolulu", "Australia/Lord_Howe", "America/Sao_Paulo",
    "Europe/Berlin", "Asia/Kathmandu",
)  # fmt: skip
DAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
TODAY = date(2026, 11, 24)


# -- the second expansion ----------------------------------------------------------------------------------------------


def named(frequency, interval, by_day, first, day):
    """Whether a rule that begins on `first` names a day; of MONTHLY, BYDAY has ordinals or names each such weekday."""
    if frequency == "DAILY":
        return (day - first).days % interval == 0 and (not by_day or DAYS[day.weekday()] in by_day)
    if frequency == "WEEKLY":
        weeks = (day - timedelta(days=day.weekday()) - (first - timedelta(days=first.weekday()))).days // 7
        return weeks % interval == 0 and DAYS[day.weekday()] in (by_day or {DAYS[first.weekday()]})
    months = (day.year - first.year) * 12 + day.month - first.month
    if months % interval:
        return False
    if not by_day:
        return day.day == first.day
    length = calendar.monthrange(day.year, day.month)[1]
    name = DAYS[day.weekday()]
    return bool({name, f"{(day.day + 6) // 7}{name}", f"-{(length - day.day) // 7 + 1}{name}"} & by_day)


def expanded(frequency, interval, by_day, first, count, until):
    day, found = first, []
    while (until is None or day <= until) and (not count or len(found) < count):
        if named(frequency, interval, by_day, first, day):
            found.append(day)
        day += timedelta(days=1)
        if day > first + timedelta(days=4 * 366):
            break
    return found


def shown(instant, zone):
    """What the clock on the wall shows."""
    return instant.astimezone(ZoneInfo(zone)).replace(tzinfo=None)


def first_showing(local, zone):
    """The first minute at which the wall shows this time or, where it is skipped, what it shows as much later as is skipped."""
    begin = local.replace(tzinfo=UTC) - timedelta(hours=15)
    minutes = [begin + timedelta(minutes=n) for n in range(30 * 60)]
    walls = [shown(minute, zone) for minute in minutes]
    if local in walls:
        return minutes[walls.index(local)]
    at = next(n for n, wall in enumerate(walls) if wall > local)
    gap = walls[at] - walls[at - 1] - timedelta(minutes=1)
    return minutes[walls.index(local + gap)]


@st.composite
def rules(draw):
    frequency = draw(st.sampled_from(["DAILY", "WEEKLY", "MONTHLY"]))
    interval = draw(st.integers(1, 9))
    first = TODAY + timedelta(days=draw(st.integers(0, 200)))
    own = DAYS[first.weekday()]
    if frequency == "MONTHLY":
        own = draw(st.sampled_from([own, f"{(first.day + 6) // 7}{own}"]))
    by_day = set(draw(st.sampled_from([[], [own], [own, "WE"], [own, "FR", "TU"]])))
    count = draw(st.sampled_from([0, 1, 2, 7, 15]))
    until = None if count else first + timedelta(days=draw(st.integers(0, 300)))
    return frequency, interval, by_day, first, count, until


@given(rules(), st.sampled_from(ZONES), st.sampled_from(["09:00", "02:30", "01:30", "00:15", "23:45"]))
@settings(max_examples=100, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_a_series_is_at_the_local_wall_times_that_its_rule_names(rule, zone, clock):
    """cal.diy#1092 and others of the DST row: visits an hour off after a change of the clock."""
    frequency, interval, by_day, first, count, until = rule
    text = f"FREQ={frequency};INTERVAL={interval}" + (f";BYDAY={','.join(sorted(by_day))}" if by_day else "")
    text += f";COUNT={count}" if count else f";UNTIL={until:%Y%m%d}"
    days = expanded(frequency, interval, by_day, first, count, until)
    start = datetime.combine(first, time.fromisoformat(clock))
    end = TODAY + relativedelta(months=recurrence.MONTHS)
    read = recurrence.read(text, ZoneInfo(zone))
    assert recurrence.read(str(read), ZoneInfo(zone)) == read
    if len(days) > recurrence.MOST or days[-1] > end or len(days) < count:
        with pytest.raises(Invalid):
            recurrence.wall_times(read, start, TODAY)
        return
    times = recurrence.wall_times(read, start, TODAY)
    assert times == [datetime.combine(day, time.fromisoformat(clock)) for day in days]
    # All by the service's own other reading of wall times, which has its own oracle; days around a change minute by minute.
    for local in times:
        at = recurrence.instant(local, zone)
        low = int(at.timestamp()) - 86_400
        seconds = local.hour * 3600 + local.minute * 60
        clock_of = LocalClock(ZoneInfo(zone), low, low + 2 * 86_400)
        assert clock_of.instant(local.toordinal(), seconds) == int(at.timestamp())


@pytest.mark.parametrize(
    ("zone", "day", "clock", "utc"),
    [
        ("America/New_York", "2027-03-14", "02:30", "2027-03-14T07:30"),  # skipped: 03:30 on the wall
        ("America/New_York", "2027-11-07", "01:30", "2027-11-07T05:30"),  # twice: the first one
        (
            "Australia/Lord_Howe",
            "2027-10-03",
            "02:15",
            "2027-10-02T15:45",
        ),  # half an hour is skipped: 02:45 on the wall
        ("Australia/Lord_Howe", "2027-04-04", "01:45", "2027-04-03T14:45"),
        ("America/Phoenix", "2027-03-14", "02:30", "2027-03-14T09:30"),
        ("Pacific/Honolulu", "2027-11-07", "23:45", "2027-11-08T09:45"),
    ],
)
def test_times_that_a_clock_skips_or_shows_twice_are_read_by_the_one_rule(zone, day, clock, utc):
    local = datetime.fromisoformat(f"{day}T{clock}")
    assert recurrence.instant(local, zone) == datetime.fromisoformat(f"{utc}:00+00:00")
    assert first_showing(local, zone) == recurrence.instant(local, zone)


def test_an_evening_series_keeps_its_day_though_the_server_counts_in_utc():
    """medplum#8417: the date of an evening was the server's."""
    times = recurrence.wall_times(
        recurrence.read("FREQ=WEEKLY;COUNT=3", NEW_YORK), datetime(2026, 12, 1, 20, 30), TODAY
    )
    instants = [recurrence.instant(local, "America/New_York") for local in times]
    assert [one.weekday() for one in instants] == [2, 2, 2]  # Wednesday in UTC
    assert [shown(one, "America/New_York").weekday() for one in instants] == [1, 1, 1]


def test_an_until_in_utc_is_read_by_the_clinics_clock():
    for until, count in (("20261208T205959Z", 2), ("20261215T140000Z", 3), ("20261215T135959Z", 2), ("20261215", 3)):
        rule = recurrence.read(f"FREQ=WEEKLY;UNTIL={until}", NEW_YORK)
        assert len(recurrence.wall_times(rule, datetime(2026, 12, 1, 9), TODAY)) == count, until


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("FREQ=WEEKLY", "SERIES_WITHOUT_END"),
        ("FREQ=DAILY;COUNT=1000000", "TOO_MANY_OCCURRENCES"),
        ("FREQ=DAILY;COUNT=201", "TOO_MANY_OCCURRENCES"),
        ("FREQ=DAILY;UNTIL=20281001", "TOO_MANY_OCCURRENCES"),
        ("FREQ=DAILY;UNTIL=29991231", "SERIES_TOO_LONG"),
        ("FREQ=MONTHLY;COUNT=26", "SERIES_TOO_LONG"),
        ("FREQ=MONTHLY;INTERVAL=1000;COUNT=2", "SERIES_TOO_LONG"),
        ("FREQ=MONTHLY;INTERVAL=12;BYMONTHDAY=31;COUNT=2", "FIRST_NOT_IN_RULE"),
        ("FREQ=DAILY;INTERVAL=7;BYDAY=MO;COUNT=2", "FIRST_NOT_IN_RULE"),
        ("FREQ=MONTHLY;BYDAY=1TU;BYSETPOS=9;COUNT=2", "FIRST_NOT_IN_RULE"),
        ("FREQ=YEARLY;COUNT=2", "RULE_INVALID"),
        ("FREQ=MINUTELY;COUNT=2", "RULE_INVALID"),
        ("FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30;COUNT=2", "RULE_INVALID"),
        ("FREQ=WEEKLY;COUNT=2;UNTIL=20270101", "RULE_INVALID"),
        ("FREQ=WEEKLY;COUNT=0", "RULE_INVALID"),
        ("FREQ=WEEKLY;INTERVAL=0;COUNT=2", "RULE_INVALID"),
        ("FREQ=WEEKLY;BYDAY=2MO;COUNT=2", "RULE_INVALID"),
        ("FREQ=WEEKLY;UNTIL=20270231", "RULE_INVALID"),
        ("FREQ=WEEKLY;UNTIL=٢٠٢٧٠١٠١", "RULE_INVALID"),
        ("FREQ=WEEKLY;COUNT=2;COUNT=3", "RULE_INVALID"),
        ("COUNT=3", "RULE_INVALID"),
        ("", "RULE_INVALID"),
    ],
)
def test_what_a_rule_cannot_be_is_said_and_costs_nothing(rule, reason):
    """A rule without end, or one that names a day that never comes, would be expanded up to the year 9999."""
    began = clocks.process_time()
    with pytest.raises(Invalid) as refusal:
        recurrence.wall_times(recurrence.read(rule, NEW_YORK), datetime(2026, 12, 1, 9), TODAY)
    assert refusal.value.reason == reason and refusal.value.metadata["field"] in ("rule", "start")
    assert clocks.process_time() - began < 0.2


@given(rules())
@settings(max_examples=50, deadline=None)
def test_a_series_of_every_eighth_week_that_moves_within_its_week_stays_one_of_every_eighth_week(rule):
    """openemr#7967."""
    first, day = rule[3], rule[1] % 7
    times = recurrence.wall_times(
        recurrence.read("FREQ=WEEKLY;INTERVAL=8;COUNT=5", NEW_YORK), datetime.combine(first, time(9)), TODAY
    )
    moved = [recurrence.moved(local, time(14), day) for local in times]
    read = recurrence.read("FREQ=WEEKLY;INTERVAL=8;COUNT=5", NEW_YORK).on(day, times[0])
    assert recurrence.wall_times(read, moved[0], TODAY - timedelta(days=7)) == moved
    assert {one.weekday() for one in moved} == {day}
    assert all(one.isocalendar()[:2] == other.isocalendar()[:2] for one, other in zip(times, moved, strict=True))
