"""What is read from a bundle, and what is said of one that can't be read."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protovalidate
import pytest
from care.patients.v1 import patients_pb2
from care.scheduling.v1 import directory_pb2
from google.protobuf import json_format

from system.importing.bundles import NPI, BundleBroken, BundleRead, Key, Rules, npi_check_digit_fits, read_bundle
from system.importing.places import phone_line, us_state, zone_of
from system.importing.tests.people import (
    CLINIC,
    ENCOUNTER,
    HOSPITAL,
    PATIENT,
    PRACTITIONER,
    SYNTHEA,
    bundle,
    identifier,
    resource,
    write,
)

PLANTED = "PLANTED-Zilda"


def _read(folder: Path, content: object, rules: Rules | None = None) -> BundleRead:
    return read_bundle(write(folder, "bundle.json", content), rules)


def test_a_bundle_gives_clinic_practitioner_patient_and_their_relations(tmp_path: Path) -> None:
    read = _read(tmp_path, bundle())
    (patient,), (clinic,), (practitioner,) = read.patients, read.clinics, read.practitioners
    assert patient.key == Key(HOSPITAL, "MRN-1")
    assert patient.record["identifiers"] == [
        {"system": HOSPITAL, "value": "MRN-1", "type": "MR"},
        {"system": SYNTHEA, "value": "rec-1"},
    ]
    assert patient.record["names"][0] == {
        "use": "OFFICIAL", "familyName": "Beispiel1", "givenNames": ["Zilda", "Q."], "prefixes": ["Ms."],
    }  # fmt: skip
    assert patient.record["names"][1]["use"] == "MAIDEN"
    assert patient.record["telecom"] == [
        {"system": "PHONE", "value": "555-010-4477", "use": "HOME", "lineType": "INVALID"},
        {"system": "PHONE", "value": "617-253-0000", "use": "WORK", "e164": "+16172530000", "lineType": "UNKNOWN"},
        {"system": "EMAIL", "value": "zilda1@example.org"},
    ]
    assert patient.record["languages"] == ["zh", "en-US"]
    assert (patient.record["timeZone"], patient.record["timeZoneSource"]) == ("America/New_York", "COORDINATES")
    assert (patient.record["gender"], patient.record["birthDate"]) == ("FEMALE", "1980-02-29")
    assert "deceased" not in patient.record
    assert patient.clinics == practitioner.clinics == (clinic.key,)
    assert clinic.record["timeZone"] == "America/New_York"
    assert practitioner.key == Key(NPI, "1234567893")
    assert read.skipped == Counter(
        {
            "Patient.identifier SS": 1,
            "Patient.identifier DL": 1,
            "Patient.extension us-core-race": 1,
            "Patient.extension us-core-ethnicity": 1,
            "Patient.maritalStatus": 1,
            "Encounter (only its relation is taken)": 1,
            "Observation": 1,
        }
    )
    assert [note.what for note in read.notes] == ["no number that can exist; kept as written"]


def test_what_is_read_fits_the_protos(tmp_path: Path) -> None:
    _fits(_read(tmp_path, bundle()))


def _fits(read: BundleRead) -> None:
    for patient in read.patients:
        protovalidate.validate(json_format.ParseDict(patient.record, patients_pb2.Patient()))
    for clinic in read.clinics:
        protovalidate.validate(json_format.ParseDict(clinic.record, directory_pb2.Clinic()))
    for practitioner in read.practitioners:
        protovalidate.validate(json_format.ParseDict(practitioner.record, directory_pb2.Practitioner()))


@pytest.mark.parametrize(("keep", "kept"), [("SS", "999-00-0001"), ("DL", "S99901")])
def test_a_secret_identifier_comes_in_only_if_its_kind_is_enabled(tmp_path: Path, keep: str, kept: str) -> None:
    assert kept not in str(_read(tmp_path, bundle()).patients)
    values = [
        one["value"]
        for one in _read(tmp_path, bundle(), Rules(keep=frozenset({keep}))).patients[0].record["identifiers"]
    ]
    assert values == ["MRN-1", "rec-1", kept]


def test_a_passport_without_a_type_is_told_by_its_issuer(tmp_path: Path) -> None:
    content = bundle()
    passport = "http://standardhealthrecord.org/fhir/StructureDefinition/passportNumber"
    resource(content, PATIENT)["identifier"].append(identifier(passport, "X1234567X"))
    read = _read(tmp_path, content)
    assert "X1234567X" not in str(read)
    assert read.skipped["Patient.identifier PPN"] == 1


def test_a_patient_is_matched_on_the_configured_issuer_and_no_other(tmp_path: Path) -> None:
    content = bundle()
    resource(content, PATIENT)["identifier"].append(identifier("urn:other", "42", "MR"))
    assert _read(tmp_path, content).patients[0].key == Key(HOSPITAL, "MRN-1")
    assert _read(tmp_path, content, Rules(issuer="urn:other")).patients[0].key == Key("urn:other", "42")


def test_the_issuers_only_number_without_a_type_is_taken_and_noted(tmp_path: Path) -> None:
    content = bundle()
    resource(content, PATIENT)["identifier"][1] = identifier(HOSPITAL, "MRN-1")
    read = _read(tmp_path, content)
    assert read.patients[0].record["identifiers"][0] == {"system": HOSPITAL, "value": "MRN-1", "type": "MR"}
    assert any("no type" in note.what for note in read.notes)


def test_references_by_identifier_and_by_type_and_id_are_followed(tmp_path: Path) -> None:
    content = bundle()
    encounter = resource(content, ENCOUNTER)
    encounter["serviceProvider"] = {"reference": f"Organization?identifier={SYNTHEA.replace(':', '%3A')}|clinic-a"}
    encounter["subject"] = {"reference": "Patient/p1"}
    encounter["participant"] = [{"individual": {"reference": f"Practitioner?identifier={NPI}|1234567893"}}]
    other = {**encounter, "serviceProvider": {"reference": "Organization?identifier=urn:elsewhere|clinic-z"}}
    other["subject"] = {"reference": f"Patient?identifier={SYNTHEA}|rec-1"}
    content["entry"].append({"fullUrl": "urn:uuid:e2", "resource": other})
    read = _read(tmp_path, content)
    both = (Key(SYNTHEA, "clinic-a"), Key("urn:elsewhere", "clinic-z"))
    assert read.patients[0].clinics == both
    assert read.practitioners[0].clinics == both


def test_a_cancelled_encounter_makes_no_relation_and_the_managing_organization_does(tmp_path: Path) -> None:
    content = bundle()
    resource(content, ENCOUNTER)["status"] = "entered-in-error"
    resource(content, PATIENT)["managingOrganization"] = {"reference": "urn:uuid:clinic-a"}
    read = _read(tmp_path, content)
    assert read.patients[0].clinics == (Key(SYNTHEA, "clinic-a"),)
    assert read.practitioners[0].clinics == ()


@pytest.mark.parametrize(
    ("given", "deceased", "day"),
    [
        ({"deceasedDateTime": "2008-01-08T13:33:52+00:00"}, True, "2008-01-08"),
        ({"deceasedDateTime": "2008-01"}, True, "2008-01"),
        ({"deceasedBoolean": True}, True, None),
        ({"deceasedBoolean": False}, None, None),
    ],
)
def test_death_is_read_as_precise_as_known(
    tmp_path: Path, given: dict[str, Any], deceased: bool | None, day: str | None
) -> None:
    content = bundle()
    resource(content, PATIENT).update(given)
    record = _read(tmp_path, content).patients[0].record
    assert (record.get("deceased"), record.get("deceasedDate")) == (deceased, day)


def test_a_name_of_a_period_ends_with_the_day_after_its_last(tmp_path: Path) -> None:
    content = bundle()
    resource(content, PATIENT)["name"][0]["period"] = {"start": "1980", "end": "2001-12-31"}
    assert _read(tmp_path, content).patients[0].record["names"][1]["period"] == {"endTime": "2002-01-01T00:00:00Z"}


def test_odd_phones_never_refuse_a_record(tmp_path: Path) -> None:
    content = bundle()
    resource(content, PATIENT)["telecom"] = [
        {"system": "phone", "value": "call the neighbour"},
        {"system": "phone", "value": " "},
        {"system": "phone"},
        {"value": "x@example.org"},
        {"system": "carrier pigeon", "value": "Rudi", "use": "sky", "rank": 1},
    ]
    read = _read(tmp_path, content)
    assert read.patients[0].record["telecom"] == [
        {"system": "PHONE", "value": "call the neighbour", "lineType": "INVALID"},
        {"system": "EMAIL", "value": "x@example.org"},
        {"system": "OTHER", "value": "Rudi", "rank": 1},
    ]
    assert read.skipped["Patient.telecom without a usable value"] == 2
    _fits(read)


@pytest.mark.parametrize(
    ("address", "zone"),
    [
        ({"latitude": 42.4, "longitude": -71.5, "state": "CO"}, ("America/New_York", "COORDINATES")),
        ({"state": "Massachusetts"}, ("America/New_York", "POSTAL_CODE")),
        ({"state": "ma", "country": "USA"}, ("America/New_York", "POSTAL_CODE")),
        ({"postalCode": "80202"}, ("America/Denver", "POSTAL_CODE")),
        ({"latitude": 0.0, "longitude": -30.0, "postalCode": "60601-1234"}, ("America/Chicago", "POSTAL_CODE")),
        ({"state": "TX"}, None),  # El Paso or Houston
        ({"state": "MA", "country": "XX"}, None),
        ({"postalCode": "09012"}, None),  # military mail
        ({}, None),
    ],
)
def test_a_zone_is_told_by_coordinates_else_by_a_state_that_has_only_one(
    address: dict[str, Any], zone: tuple[str, str] | None
) -> None:
    assert zone_of(address) == zone


def test_a_zip_code_tells_the_state() -> None:
    codes = {"02139": "MA", "10001": "NY", "99501": "AK", "00901": "PR", "96701": "HI", "34001": None, "ABC": None}
    assert {code: us_state({"postalCode": code}) for code in codes} == codes


def test_line_types_come_from_the_number_alone() -> None:
    assert phone_line("555-819-2167", "US") == (None, "INVALID")
    assert phone_line("+44 7400 123456", "US") == ("+447400123456", "MOBILE")
    assert phone_line("+44 20 7946 0018", "US") == ("+442079460018", "LANDLINE")


def test_the_check_digit_of_an_npi() -> None:
    assert npi_check_digit_fits("1234567893")
    assert not npi_check_digit_fits("1234567890")
    assert not npi_check_digit_fits("190")


def test_a_false_check_digit_only_warns(tmp_path: Path) -> None:
    read = _read(tmp_path, bundle(npi="190"))
    assert read.practitioners[0].key == Key(NPI, "190")
    assert [note.path for note in read.notes if note.resource == "Practitioner"] == ["entry[2].resource.identifier"]


Change = Callable[[dict[str, Any]], object]


def _set(index: int, name: str, value: object) -> Change:
    return lambda content: resource(content, index).update({name: value})


def _coordinates(content: dict[str, Any]) -> None:
    resource(content, PATIENT)["address"][0]["extension"][0]["extension"][0]["valueDecimal"] = 142.0


BREAKAGES: list[tuple[str, Change, int | None, str, str]] = [
    ("no bundle", lambda content: content.update(resourceType=PLANTED), None, "resourceType", "must be Bundle"),
    ("another type", lambda content: content.update(type=PLANTED), None, "type", "must be transaction or batch"),
    ("entries no list", lambda content: content.update(entry={PLANTED: 1}), None, "entry", "must be a list"),
    ("no resource", lambda c: c["entry"][1].pop("resource"), 1, "entry[1].resource", "is missing"),
    ("resource a text", lambda c: c["entry"][1].update(resource=PLANTED), 1, "entry[1].resource", "must be an object"),
    ("no type", lambda c: resource(c, 1).pop("resourceType"), 1, "entry[1].resource.resourceType", "is missing"),
    ("strange type", _set(1, "resourceType", PLANTED), 1, "entry[1].resource.resourceType", "names no type"),
    ("a deletion", lambda c: c["entry"][0]["request"].update(method="DELETE"), 0, "entry[0].request.method", "POST or PUT"),
    ("same fullUrl", lambda c: c["entry"][1].update(fullUrl="urn:uuid:p1"), 1, "entry[1].fullUrl", "another entry has"),
    ("gender", _set(PATIENT, "gender", PLANTED), 0, "entry[0].resource.gender", "must be one of male, female"),
    ("gender's type", _set(PATIENT, "gender", 7), 0, "entry[0].resource.gender", "must be a string"),
    ("birth date", _set(PATIENT, "birthDate", PLANTED), 0, "entry[0].resource.birthDate", "must be YYYY"),
    ("no such day", _set(PATIENT, "birthDate", "2001-02-30"), 0, "entry[0].resource.birthDate", "no day of the calendar"),
    ("no such hour", _set(PATIENT, "deceasedDateTime", "2001-02-03T25:00:00Z"), 0, "entry[0].resource.deceasedDateTime", "no time"),
    ("deceased", _set(PATIENT, "deceasedBoolean", PLANTED), 0, "entry[0].resource.deceasedBoolean", "true or false"),
    ("no names", lambda c: resource(c, PATIENT).pop("name"), 0, "entry[0].resource.name", "is missing"),
    ("names an object", _set(PATIENT, "name", {"family": PLANTED}), 0, "entry[0].resource.name", "must be a list"),
    ("an empty name", _set(PATIENT, "name", [{"use": "usual"}]), 0, "entry[0].resource.name[0]", "needs a family"),
    ("a given name", _set(PATIENT, "name", [{"given": [PLANTED, 3]}]), 0, "entry[0].resource.name[0].given[1]", "a string"),
    ("name's use", _set(PATIENT, "name", [{"use": PLANTED}]), 0, "entry[0].resource.name[0].use", "must be one of usual"),
    ("a long name", _set(PATIENT, "name", [{"family": PLANTED * 20}]), 0, "entry[0].resource.name[0].family", "longer than 100"),
    ("a NUL", _set(PATIENT, "name", [{"family": PLANTED + "\0"}]), 0, "entry[0].resource.name[0].family", "NUL"),
    ("a phone number", _set(PATIENT, "telecom", [{"value": 5550104477}]), 0, "entry[0].resource.telecom[0].value", "a string"),
    ("latitude", _coordinates, 0, "entry[0].resource.address[0].extension[0].extension[0].valueDecimal", "from -90 to 90"),
    ("address's use", _set(PATIENT, "address", [{"use": PLANTED}]), 0, "entry[0].resource.address[0].use", "must be one of"),
    ("no number", _set(PATIENT, "identifier", [identifier(SYNTHEA, PLANTED)]), 0, "entry[0].resource.identifier", "has none"),
    (
        "two numbers",
        lambda c: resource(c, PATIENT)["identifier"].append(identifier(HOSPITAL, PLANTED, "MR")),
        0, "entry[0].resource.identifier", "has several",
    ),
    ("nameless clinic", lambda c: resource(c, CLINIC).pop("name"), 1, "entry[1].resource.name", "is missing"),
    ("unknown clinic", lambda c: resource(c, CLINIC).pop("identifier"), 1, "entry[1].resource.identifier", "needs one"),
    ("practitioner", _set(PRACTITIONER, "identifier", []), 2, "entry[2].resource.identifier", "needs one with system"),
    ("no relation", lambda c: c["entry"].pop(ENCOUNTER), 0, "entry[0].resource", "no encounter's serviceProvider"),
    (
        "a reference to nothing",
        _set(ENCOUNTER, "serviceProvider", {"reference": f"urn:uuid:{PLANTED}"}),
        3, "entry[3].resource.serviceProvider.reference", "points at nothing",
    ),
    (
        "a reference to another type",
        _set(ENCOUNTER, "serviceProvider", {"reference": "urn:uuid:p1"}),
        3, "entry[3].resource.serviceProvider.reference", "must point at one of type Organization",
    ),
    (
        "half a condition",
        _set(ENCOUNTER, "serviceProvider", {"reference": f"Organization?identifier={PLANTED}"}),
        3, "entry[3].resource.serviceProvider.reference", "must be Organization?identifier",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "entry", "path", "what"), [row[1:] for row in BREAKAGES], ids=[row[0] for row in BREAKAGES]
)
def test_a_broken_bundle_names_file_entry_and_path_and_no_value(
    tmp_path: Path, change: Change, entry: int | None, path: str, what: str
) -> None:
    content = bundle()
    change(content)
    with pytest.raises(BundleBroken) as caught:
        _read(tmp_path, content)
    broken = caught.value
    assert (broken.file, broken.entry, broken.path) == ("bundle.json", entry, path)
    assert what in broken.what
    for value in (PLANTED, "Zilda", "Beispiel1", "MRN-1", "999-00", "5550104477", "2001-02"):
        assert value not in str(broken)
    assert broken.__cause__ is None and broken.__suppress_context__


@pytest.mark.parametrize("text", ["", '{"resourceType": "Zilda', "[1, 2", "\xff\xfe", "[" * 5000])
def test_a_file_that_is_no_json_tells_the_line_and_nothing_of_the_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cut.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BundleBroken, match=r"cut\.json: \$: no JSON: line \d+, column \d+$"):
        read_bundle(path)


def test_a_bundle_without_a_patient_brings_its_directory(tmp_path: Path) -> None:
    content = bundle() | {"type": "batch"}
    content["entry"] = content["entry"][CLINIC : PRACTITIONER + 1]
    read = _read(tmp_path, content)
    assert (len(read.clinics), len(read.practitioners), len(read.patients)) == (1, 1, 0)


@pytest.mark.skipif(
    "CARE_SYNTHEA" not in os.environ, reason="CARE_SYNTHEA names no folder with Synthea's sample bundles"
)
def test_the_real_bundles_are_read_whole() -> None:
    reads = [read_bundle(path) for path in sorted(Path(os.environ["CARE_SYNTHEA"]).glob("*.json"))]
    assert len(reads) == 21
    for read in reads:
        _fits(read)
    patients = [patient.record for read in reads for patient in read.patients]
    assert len(patients) == len({str(one["identifiers"][0]) for one in patients}) == 21
    assert len({clinic.key for read in reads for clinic in read.clinics}) == 27
    assert len({one.key for read in reads for one in read.practitioners}) == 27
    assert sum(len(patient.clinics) for read in reads for patient in read.patients) == 33
    assert {one["timeZone"] for one in patients} == {"America/New_York"}
    assert sum("deceased" in one for one in patients) == 1
    assert {language for one in patients for language in one["languages"]} == {"en-US", "zh"}
    assert {point["lineType"] for one in patients for point in one["telecom"]} == {"INVALID"}
    assert {one["type"] for record in patients for one in record["identifiers"] if "type" in one} == {"MR"}
    skipped = sum((read.skipped for read in reads), Counter[str]())
    assert (skipped["Patient.identifier SS"], skipped["Patient.extension us-core-race"]) == (21, 21)
    assert skipped["Observation"] == 1666
