"""What is read from a file on clinics, and what is said of a faulty one."""

from pathlib import Path

import protovalidate
import pytest
from care.scheduling.v1 import directory_pb2
from google.protobuf import json_format

import system.importing.clinics
from system.importing.bundles import NPI, SYNTHEA, Key
from system.importing.clinics import ClinicsFile, ClinicsFileBroken, read_clinics

EXAMPLE = Path(system.importing.clinics.__file__).with_name("example-clinics.json")


def _read(folder: Path, name: str, text: str) -> ClinicsFile:
    path = folder / name
    path.write_text(text)
    return read_clinics(path)


def test_the_example_is_read_and_fits_the_protos() -> None:
    file = read_clinics(EXAMPLE)
    assert {entry.record["timeZone"] for entry in file.clinics} == {"America/New_York", "America/Denver"}
    assert [entry.code for entry in file.visit_types] == ["follow-up", "cardiology-consult", "video-check-in"]
    for entry in file.clinics:
        protovalidate.validate(json_format.ParseDict(entry.record, directory_pb2.Clinic()))
        protovalidate.validate(json_format.ParseDict({"weeklyHours": list(entry.hours)}, directory_pb2.Schedule()))
    for visit_type in file.visit_types:
        protovalidate.validate(json_format.ParseDict(visit_type.record, directory_pb2.VisitType()))
    for practitioner in file.practitioners:
        protovalidate.validate(json_format.ParseDict(practitioner.record, directory_pb2.Practitioner()))
    assert file.practitioners[0].key == Key(NPI, "1234567893")
    assert file.practitioners[0].roles[1].hours == ({"weekday": 3, "start": "09:00", "end": "12:00"},)


def test_a_csv_says_the_same_as_json(tmp_path: Path) -> None:
    as_csv = _read(
        tmp_path,
        "clinics.csv",
        "identifier,name,time_zone,holiday_region,hours,specialties,closed_dates,rooms,street,phone\n"
        'a,"Clinic, North",America/Chicago,US-IL,"Mo-We 8:00-12:00; Fr 22:00-06:00",394579002|Cardiology,'
        "2026-12-24;2026-12-31,exam-room:Room 1,1 Way,617-253-0000\n"
        "b,,America/Denver,,,,,,,\n",
    )
    as_json = _read(
        tmp_path,
        "clinics.json",
        """{"clinics": [
        {"identifier": "a", "name": "Clinic, North", "time_zone": "America/Chicago", "holiday_region": "US-IL",
         "hours": ["Mo,Tu-We 08:00-12:00", "Fr 22:00-06:00"],
         "specialties": [{"system": "http://snomed.info/sct", "code": "394579002", "display": "Cardiology"}],
         "closed_dates": ["2026-12-24", "2026-12-31"], "rooms": ["exam-room:Room 1"], "street": "1 Way", "phone": "617-253-0000"},
        {"identifier": "b", "time_zone": "America/Denver"}]}""",
    )
    assert [(entry.record, entry.hours, entry.rooms) for entry in as_csv.clinics] == [
        (entry.record, entry.hours, entry.rooms) for entry in as_json.clinics
    ]
    assert [entry.line for entry in as_csv.clinics] == [2, 3]
    assert as_csv.clinics[0].key == Key(SYNTHEA, "a")
    assert as_csv.clinics[0].hours[-1] == {"weekday": 5, "start": "22:00", "end": "06:00"}
    assert as_csv.clinics[0].record["telecom"][0]["e164"] == "+16172530000"


def test_a_span_of_days_may_pass_the_weekend(tmp_path: Path) -> None:
    file = _read(tmp_path, "c.csv", "identifier,hours\na,Sa-Mo 10:00-11:00\n")
    assert [block["weekday"] for block in file.clinics[0].hours] == [1, 6, 7]


@pytest.mark.parametrize("empty", ["", "\n", "identifier,name\n"])
def test_a_csv_without_a_clinic_is_told(tmp_path: Path, empty: str) -> None:
    with pytest.raises(ClinicsFileBroken, match="holds no clinic"):
        _read(tmp_path, "c.csv", empty)


def test_everything_that_is_wrong_in_a_csv_is_told_at_once_with_line_and_column(tmp_path: Path) -> None:
    text = (
        "identifier,time_zone,hours,colour\n"
        "a,Europe/Atlantis,Mo-Fr 8-12,\n"
        "\n"
        "b,America/Denver,Mo 08:00-12:00; Mo 11:00-13:00,red\n"
        ",America/Denver,Xx 08:00-12:00,\n"
        "a,America/Denver,Mo 25:00-26:00,,surplus\n"
    )
    with pytest.raises(ClinicsFileBroken) as caught:
        _read(tmp_path, "c.csv", text)
    assert [(problem.line, problem.column) for problem in sorted(caught.value.problems, key=lambda one: (one.line, one.column))] == [
        (2, "hours"), (2, "time_zone"), (4, "colour"), (4, "hours"), (5, "hours"), (5, "identifier"),
        (6, "-"), (6, "hours"), (6, "identifier"),
    ]  # fmt: skip
    assert "c.csv, line 2, time_zone: write an IANA time zone such as America/New_York" in str(caught.value)


def test_what_is_wrong_in_json_is_told_with_line_and_path(tmp_path: Path) -> None:
    text = """{
  "clinics": [
    {"identifier": "a", "holiday_region": "US-XX",
     "closed_dates": ["2026-12-24",
       "2026-02-30"]},
    7
  ],
  "visit_types": [
    {"code": "A B", "modality": "TELEPATHY",
     "duration_minutes": 0},
    {"name": "x", "preparation": {"not a language": "x"}, "active": "no"}
  ],
  "practitioners": [
    {"identifier": "1", "given_names": ["Ada"], "languages": ["English!"],
     "roles": [
       {"clinic": "a", "hours": "Mo 08:00-12:00"},
       {"clinic": "a", "specialties": ["heart"]}]}
  ],
  "colour": []
}"""
    with pytest.raises(ClinicsFileBroken) as caught:
        _read(tmp_path, "c.json", text)
    assert sorted((problem.line, problem.column) for problem in caught.value.problems) == [
        (3, "clinics[0].holiday_region"),
        (4, "clinics[0].closed_dates"),
        (6, "clinics[1]"),
        (9, "visit_types[0].code"),
        (9, "visit_types[0].modality"),
        (10, "visit_types[0].duration_minutes"),
        (11, "visit_types[1].active"),
        (11, "visit_types[1].code"),
        (11, "visit_types[1].preparation"),
        (14, "practitioners[0].family_name"),
        (14, "practitioners[0].languages"),
        (17, "practitioners[0].roles[1].clinic"),
        (17, "practitioners[0].roles[1].specialties"),
        (19, "colour"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.json", '{"clinics": [\n{"identifier": }]}', "line 2, column 16: mend the JSON"),
        ("c.json", "[]", "line 1, $: write an object with clinics"),
        ("c.json", '{"clinics": {}}', "line 1, clinics: write a list of objects"),
        ("c.csv", 'identifier\n"a\n', "mend the quoting"),
        ("c.xlsx", "", "name the file .csv or .json"),
    ],
)
def test_a_file_that_cant_be_parsed_says_where(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(ClinicsFileBroken) as caught:
        _read(tmp_path, name, text)
    assert told in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClinicsFileBroken, match=r"nowhere\.csv, line \?, -: can't be read: No such file"):
        read_clinics(tmp_path / "nowhere.csv")
