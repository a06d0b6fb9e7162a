"""The data set: a made-up health system of any size, the same for the same size and day."""

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Table

from bench.rows import Rows
from system.issuer import TENANT_ID

ZONES = ("America/New_York", "America/Chicago", "America/Phoenix")
PRACTITIONERS_PER_CLINIC = 4
OPENS, CLOSES, MINUTES = 8, 18, 15
PER_DAY = (CLOSES - OPENS) * 60 // MINUTES
"""Visits that a practitioner can see in a day."""
STAFF_CLINICS = 5
"""Clinics that a staff member works for."""
_FREE_FROM = 21
"""Days after the first on which nobody has a visit yet."""
_FAMILIES = "ar ba cor den el fen gar hol is jor kel lin mor nor os par quin ros sten tor".split()
_ENDINGS = "berg dale field ham ley lund man mere ner son ton well wick wood worth".split()
_GIVEN = (
    "Ada Ben Cleo Dan Ella Finn Gwen Hugo Iris Jon Kira Leo Mila Ned Ona Pia Ravi Sol Tess Uma Vic Wes Yara Zoe".split()
)


def uid(kind: int, number: int) -> str:
    """Id number `number` of a kind of row; shaped as UUIDv7."""
    return f"019a{kind:04x}-0000-7000-8000-{number:012x}"


PATIENT, APPOINTMENT, RELATION, REFERRAL, MESSAGE, INVITATION, RESPONSE, TASK = range(1, 9)


def subject(number: int) -> str:
    """The login of the benchmark's staff member `number`."""
    return f"bench-{number}@sample"


@dataclass(frozen=True)
class Directory:
    """Ids that the services gave to what was made through the API."""

    clinics: Sequence[str]
    practitioners: Sequence[str]
    """Clinic by clinic, `PRACTITIONERS_PER_CLINIC` each."""
    visit_type: str
    pool: str
    questionnaire: str
    staff: int


@dataclass(frozen=True)
class Data:
    """What is written into the databases. `day` is the first day with visits still to come."""

    patients: int
    appointments: int
    day: date
    directory: Directory

    @property
    def visits(self) -> int:
        """Visits of each patient: all but the last are past."""
        return max(1, self.appointments // self.patients)

    @property
    def _clinics(self) -> int:
        return len(self.directory.clinics)

    @cached_property
    def _first_day(self) -> date:
        per_clinic = -(-self.patients // self._clinics)
        before = (self.visits - 1) * per_clinic // PRACTITIONERS_PER_CLINIC // PER_DAY
        return self.day - timedelta(days=before)

    def opening(self, clinic: int, day: date) -> int:
        """Epoch second at which a clinic opens on a day."""
        return round(datetime.combine(day, time(OPENS), ZoneInfo(ZONES[clinic % len(ZONES)])).timestamp())

    @cached_property
    def _openings(self) -> list[list[int]]:
        days = -(-self.visits * -(-self.patients // self._clinics) // PRACTITIONERS_PER_CLINIC // PER_DAY) + 2
        return [
            [self.opening(zone, self._first_day + timedelta(days=n)) for n in range(days)] for zone in range(len(ZONES))
        ]

    def visit(self, patient: int, visit: int) -> tuple[int, int, int]:
        """(clinic, number of the practitioner, start in epoch seconds) of one visit; no two of them overlap."""
        clinic, place = patient % self._clinics, patient // self._clinics
        line = visit * -(-self.patients // self._clinics) + place
        slot, practitioner = divmod(line, PRACTITIONERS_PER_CLINIC)
        day, within = divmod(slot, PER_DAY)
        start = self._openings[clinic % len(ZONES)][day] + within * MINUTES * 60
        return clinic, clinic * PRACTITIONERS_PER_CLINIC + practitioner, start

    def free_slot(self, number: int) -> tuple[int, int, int]:
        """As `visit`, of a slot that nobody has: neighbours in number are at different practitioners."""
        everyone = len(self.directory.practitioners)
        slot, practitioner = divmod(number, everyone)
        day, within = divmod(slot, PER_DAY)
        clinic = practitioner // PRACTITIONERS_PER_CLINIC
        opens = self.opening(clinic, self.day + timedelta(days=_FREE_FROM + day))
        return clinic, practitioner, opens + within * MINUTES * 60

    # -- rows ----------------------------------------------------------------------------------------------------------

    def tables(self, service: str) -> list[tuple[Rows, Iterator[Sequence[str]]]]:
        """What is written into one service's database."""
        tables = _metadata(service)
        own = getattr(self, f"_{service}")(tables)
        return [(self._rows(tables["record_subject"], _SUBJECT), self._subjects()), *own]

    def _rows(self, table: Table, varying: str, **same: Any) -> Rows:
        times = {
            column.name: datetime.combine(self._first_day, time(), UTC)
            for column in table.columns
            if column.name in ("create_time", "update_time") and column.name not in varying.split()
        }
        version = {"version": 1} if "version" in table.columns and "version" not in varying.split() else {}
        return Rows(table, varying.split(), **{"tenant_id": TENANT_ID, **times, **version, **same})

    def _clinic_id(self, patient: int) -> str:
        return self.directory.clinics[patient % self._clinics]

    def _subjects(self) -> Iterator[Sequence[str]]:
        for n in range(self.patients):
            patient = uid(PATIENT, n)
            yield patient, f"{{{patient},{self._clinic_id(n)}}}"

    def _patients(self, tables: Mapping[str, Table]) -> Any:
        from services.patients.names import fold, phonetic

        families = [(first + second).title() for first in _FAMILIES for second in _ENDINGS]
        folded = {name: (fold(name), phonetic(name)) for name in families}

        def patients() -> Iterator[Sequence[str]]:
            for n in range(self.patients):
                family, given = families[n * 7 % len(families)], _GIVEN[n * 11 % len(_GIVEN)]
                digits = f"212{2000000 + n % 7900000}"
                phone = (
                    f'[{{"system":"PHONE","value":"{digits}","use":"MOBILE","e164":"+1{digits}","line_type":"MOBILE"}}]'
                )
                yield (
                    uid(PATIENT, n),
                    f'[{{"family_name":"{family}","given_names":["{given}"],"use":"OFFICIAL"}}]',
                    phone,
                    f'[{{"system":"urn:bench:mrn","value":"B{n:07}","type":"MR"}}]',
                    f"{1930 + n % 90}-{1 + n % 12:02}-{1 + n % 28:02}",
                    "FEMALE" if n % 2 else "MALE",
                    f"{{{self._clinic_id(n)}}}",
                    folded[family][0],
                    fold(given),
                    folded[family][1],
                    f"{{{digits}}}",
                )

        def relations() -> Iterator[Sequence[str]]:
            for n in range(self.patients):
                yield uid(RELATION, n), uid(PATIENT, n), self._clinic_id(n)

        def tasks() -> Iterator[Sequence[str]]:
            for n in range(self.patients):
                # Some two of a hundred are still to be done.
                is_open = n % 50 == 0
                due = datetime.combine(self.day + timedelta(days=n % 20 if is_open else -(n % 300)), time(16), UTC)
                yield (
                    uid(TASK, n),
                    uid(PATIENT, n),
                    f'{{"type":"Appointment","id":"{uid(APPOINTMENT, n * self.visits)}"}}',
                    uid(APPOINTMENT, n * self.visits),
                    self._clinic_id(n),
                    due.isoformat(),
                    "READY" if is_open else "COMPLETED",
                )

        return [
            (
                self._rows(
                    tables["patient"],
                    "id names telecom identifiers birth_date gender clinic_ids family_folded given_folded family_phonetic"
                    " phone_digits",
                    access_version=1,
                    languages=["en"],
                    time_zone="America/New_York",
                    time_zone_source="STATED",
                    active=True,
                    addresses=[{"lines": ["1 Example Street"], "city": "Albany", "state": "NY", "country": "US"}],
                ),
                patients(),
            ),
            (
                self._rows(tables["relation"], "id patient_id grantee_id", kind="clinic", reason="registered"),
                relations(),
            ),
            (
                self._rows(
                    tables["task"],
                    "id patient_id source source_id clinic_id due_time status",
                    code="rebook-no-show",
                    owner={"type": "Pool", "id": self.directory.pool},
                    owner_id=self.directory.pool,
                    pool_id=self.directory.pool,
                    history=[_step("create", "", "READY")],
                ),
                tasks(),
            ),
        ]

    def _visits(self) -> Iterator[tuple[int, int, int, int, str]]:
        """(number, patient, number of the practitioner, start, status)."""
        for patient in range(self.patients):
            for visit in range(self.visits):
                _, practitioner, start = self.visit(patient, visit)
                number = patient * self.visits + visit
                yield number, patient, practitioner, start, self._status(number, visit)

    def _status(self, number: int, visit: int) -> str:
        if visit == self.visits - 1:
            return "BOOKED"
        return "CANCELLED" if number % 12 == 5 else "NOSHOW" if number % 20 == 7 else "FULFILLED"

    def _scheduling(self, tables: Mapping[str, Table]) -> Any:
        everyone = self.directory.practitioners
        histories = {
            status: json.dumps([_step("book", "", "BOOKED"), *([step] if (step := _LAST_STEPS[status]) else [])])
            for status in ("BOOKED", "CANCELLED", "NOSHOW", "FULFILLED")
        }

        def bookable() -> Iterator[Sequence[str]]:
            for n, practitioner in enumerate(everyone, 1):
                yield practitioner, str(n), "practitioner"
            for n in range(self.patients):
                yield uid(PATIENT, n), str(len(everyone) + 1 + n), "patient"

        def appointments() -> Iterator[Sequence[str]]:
            for number, n, practitioner, start, status in self._visits():
                begin, end = _iso(start), _iso(start + MINUTES * 60)
                period = f'"period":{{"start_time":"{begin}","end_time":"{end}"}}'
                patient, clinic = uid(PATIENT, n), n % self._clinics
                yield (
                    uid(APPOINTMENT, number),
                    patient,
                    status,
                    self.directory.clinics[clinic],
                    everyone[practitioner],
                    begin,
                    end,
                    ZONES[clinic % len(ZONES)],
                    f'[{{"actor":{{"type":"Practitioner","id":"{everyone[practitioner]}"}},"role":"practitioner",'
                    f'"status":"ACCEPTED",{period}}},{{"actor":{{"type":"Patient","id":"{patient}"}},"role":"patient",'
                    f'"status":"ACCEPTED",{period}}}]',
                    histories[status],
                )

        def occupancy() -> Iterator[Sequence[str]]:
            for number, n, practitioner, start, status in self._visits():
                if status != "CANCELLED":
                    holder = uid(APPOINTMENT, number)
                    for no in (practitioner + 1, len(everyone) + 1 + n):
                        begin = (no << 34) + start
                        yield holder, str(no), f"[{begin},{begin + MINUTES * 60})"

        return [
            (self._rows(tables["bookable"], "ref_id no kind"), bookable()),
            (
                self._rows(
                    tables["appointment"],
                    "id patient_id status clinic_id practitioner_id start_time end_time time_zone participants history",
                    visit_type_id=self.directory.visit_type,
                    modality="IN_PERSON",
                    schedule_version=1,
                    late_cancel_hours=24,
                ),
                appointments(),
            ),
            (self._rows(tables["occupancy"], "holder_id no during", lane=0), occupancy()),
        ]

    def _referrals(self, tables: Mapping[str, Table]) -> Any:
        def referrals() -> Iterator[Sequence[str]]:
            for number in range(2 * self.patients):
                n, is_open = number // 2, number % 2 == 0
                since = datetime.combine(self.day - timedelta(days=n % 10 if is_open else 60 + n % 200), time(15), UTC)
                due = since + timedelta(days=14)
                yield (
                    uid(REFERRAL, number),
                    uid(PATIENT, n),
                    "ACCEPTED" if is_open else "CLOSED",
                    self._clinic_id(n),
                    since.isoformat(),
                    due.isoformat() if is_open else r"\N",
                    due.isoformat() if is_open else "9999-12-31T00:00:00+00:00",
                    "make a visit" if is_open else "",
                )

        return [
            (
                self._rows(
                    tables["referral"],
                    "id patient_id business_status clinic_id state_time due_time list_time next_action",
                    specialty={"system": "http://snomed.info/sct", "code": "394579002", "display": "Cardiology"},
                    owner={"type": "Pool", "id": self.directory.pool},
                    owner_id=self.directory.pool,
                    pool_id=self.directory.pool,
                    history=[_step("create", "", "DRAFT"), _step("submit", "DRAFT", "SUBMITTED")],
                ),
                referrals(),
            )
        ]

    def _notifications(self, tables: Mapping[str, Table]) -> Any:
        def messages() -> Iterator[Sequence[str]]:
            for number in range(3 * self.patients):
                n, which = divmod(number, 3)
                visit = n * self.visits + max(0, self.visits - 1 - which)
                patient = uid(PATIENT, n)
                due = datetime.combine(self.day - timedelta(days=1 + number % 90), time(17), UTC).isoformat()
                yield (
                    uid(MESSAGE, number),
                    patient,
                    f'{{"type":"Patient","id":"{patient}"}}',
                    patient,
                    self._clinic_id(n),
                    f'{{"type":"Appointment","id":"{uid(APPOINTMENT, visit)}"}}',
                    uid(APPOINTMENT, visit),
                    ("booked", "3d", "1d")[which],
                    due,
                    due,
                    due,
                    due,
                    due,
                )

        return [
            (
                self._rows(
                    tables["message"],
                    "id patient_id recipient recipient_id clinic_id about about_id offset due_time expire_time next_time"
                    " sent_time create_time",
                    kind="appointment-reminder",
                    purpose="appointment-reminder",
                    channel="SMS",
                    channels=["SMS"],
                    schedule_version=1,
                    status="COMPLETED",
                    language="en",
                    open_from="08:00",
                    open_until="21:00",
                    text="Your visit is on Monday at 10:00. Reply 1 to confirm, 2 for another time, 3 if you can't come.",
                    history=[_step("make", "", "PREPARATION"), _step("start", "PREPARATION", "IN_PROGRESS")],
                ),
                messages(),
            )
        ]

    def _feedback(self, tables: Mapping[str, Table]) -> Any:
        def visit(n: int) -> str:
            return uid(APPOINTMENT, n * self.visits + max(0, self.visits - 2))

        def invitations() -> Iterator[Sequence[str]]:
            for n in range(self.patients):
                patient = uid(PATIENT, n)
                due = datetime.combine(self.day - timedelta(days=1 + n % 30), time(17), UTC)
                yield (
                    uid(INVITATION, n),
                    patient,
                    f'{{"type":"Patient","id":"{patient}"}}',
                    patient,
                    visit(n),
                    self._clinic_id(n),
                    due.isoformat(),
                    (due + timedelta(days=30)).isoformat(),
                    f"\\\\x{n:064x}",
                )

        def responses() -> Iterator[Sequence[str]]:
            for n in range(self.patients):
                yield uid(RESPONSE, n), uid(PATIENT, n), uid(INVITATION, n), visit(n), self._clinic_id(n), str(n % 11)

        return [
            (
                self._rows(
                    tables["survey_invitation"],
                    "id patient_id recipient recipient_id appointment_id clinic_id due_time expire_time token_hash",
                    questionnaire_id=self.directory.questionnaire,
                    status="COMPLETED",
                    history=[_step("plan", "", "PLANNED"), _step("invite", "PLANNED", "INVITED")],
                ),
                invitations(),
            ),
            (
                self._rows(
                    tables["questionnaire_response"],
                    "id patient_id invitation_id appointment_id clinic_id score",
                    questionnaire_id=self.directory.questionnaire,
                    status="COMPLETED",
                    language="en",
                    answers=[{"link_id": "q1", "value": 8}],
                    history=[_step("complete", "", "COMPLETED")],
                ),
                responses(),
            ),
        ]


_SUBJECT = "patient_id grantee_ids"


def _metadata(service: str) -> Mapping[str, Table]:
    found: Mapping[str, Table] = importlib.import_module(f"services.{service}.service").SERVICE.base.metadata.tables
    return found


def _step(action: str, before: str, after: str) -> dict[str, str]:
    return {
        "action": action,
        "from_status": before,
        "to_status": after,
        "reason_code": "",
        "time": "2026-01-05T15:00:00+00:00",
        "actor": "system:scheduling",
        "on_behalf_of": "",
        "source": "PHONE",
    }


_LAST_STEPS = {
    "BOOKED": None,
    "CANCELLED": _step("cancel", "BOOKED", "CANCELLED"),
    "NOSHOW": _step("mark_no_show", "BOOKED", "NOSHOW"),
    "FULFILLED": _step("fulfill", "CHECKED_IN", "FULFILLED"),
}


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
