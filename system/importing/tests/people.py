"""Bundles of made-up persons for the tests."""

import json
from pathlib import Path
from typing import Any

SYNTHEA = "https://github.com/synthetichealth/synthea"
HOSPITAL = "http://hospital.smarthealthit.org"
V2 = "http://terminology.hl7.org/CodeSystem/v2-0203"

PATIENT, CLINIC, PRACTITIONER, ENCOUNTER = range(4)
"""Index of each entry of `bundle()`."""


def identifier(system: str, value: str, type_: str | None = None) -> dict[str, Any]:
    """A FHIR Identifier."""
    coded = {"type": {"coding": [{"system": V2, "code": type_}]}} if type_ else {}
    return {"system": system, "value": value} | coded


def bundle(number: int = 1, clinic: str = "clinic-a", npi: str = "1234567893") -> dict[str, Any]:
    """A transaction bundle with one patient, clinic, practitioner, encounter and observation."""
    patient: dict[str, Any] = {
        "resourceType": "Patient",
        "id": f"p{number}",
        "identifier": [
            identifier(SYNTHEA, f"rec-{number}"),
            identifier(HOSPITAL, f"MRN-{number}", "MR"),
            identifier("http://hl7.org/fhir/sid/us-ssn", f"999-00-{number:04}", "SS"),
            identifier("urn:oid:2.16.840.1.113883.4.3.25", f"S9990{number}", "DL"),
        ],
        "name": [
            {"use": "maiden", "family": "Vorher", "given": ["Zilda"]},
            {"use": "official", "family": f"Beispiel{number}", "given": ["Zilda", "Q."], "prefix": ["Ms."]},
        ],
        "telecom": [
            {"system": "phone", "value": "555-010-4477", "use": "home"},
            {"system": "phone", "value": "617-253-0000", "use": "work"},
            {"system": "email", "value": f"zilda{number}@example.org"},
        ],
        "gender": "female",
        "birthDate": "1980-02-29",
        "address": [
            {
                "extension": [
                    {
                        "url": "http://hl7.org/fhir/StructureDefinition/geolocation",
                        "extension": [
                            {"url": "latitude", "valueDecimal": 42.36},
                            {"url": "longitude", "valueDecimal": -71.06},
                        ],
                    }
                ],
                "line": ["1 Beispielweg"],
                "city": "Boston",
                "state": "Massachusetts",
                "country": "US",
            }
        ],
        "communication": [
            {"language": {"coding": [{"system": "urn:ietf:bcp:47", "code": "en-US"}]}},
            {"language": {"coding": [{"system": "urn:ietf:bcp:47", "code": "zh"}]}, "preferred": True},
        ],
        "extension": [
            {"url": "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race", "extension": []},
            {"url": "http://hl7.org/fhir/us/core/StructureDefinition/us-core-ethnicity", "extension": []},
        ],
        "maritalStatus": {"text": "S"},
    }
    organization = {
        "resourceType": "Organization",
        "id": clinic,
        "identifier": [identifier(SYNTHEA, clinic)],
        "active": True,
        "name": f"Clinic {clinic}",
        "telecom": [{"system": "phone", "value": "6172530000"}],
        "address": [{"line": ["2 Way"], "city": "Boston", "state": "MA", "postalCode": "02139", "country": "US"}],
    }
    practitioner = {
        "resourceType": "Practitioner",
        "identifier": [identifier("http://hl7.org/fhir/sid/us-npi", npi)],
        "active": True,
        "name": [{"family": "Muster", "given": ["Ole"], "prefix": ["Dr."]}],
        "gender": "male",
    }
    encounter = {
        "resourceType": "Encounter",
        "status": "finished",
        "subject": {"reference": f"urn:uuid:p{number}"},
        "participant": [{"individual": {"reference": f"urn:uuid:npi{npi}"}}],
        "serviceProvider": {"reference": f"urn:uuid:{clinic}"},
    }
    entries = [
        (f"urn:uuid:p{number}", patient),
        (f"urn:uuid:{clinic}", organization),
        (f"urn:uuid:npi{npi}", practitioner),
        (f"urn:uuid:e{number}", encounter),
        (f"urn:uuid:o{number}", {"resourceType": "Observation", "status": "final"}),
    ]
    return {
        "resourceType": "Bundle",
        "type": "transaction",
        "entry": [
            {"fullUrl": url, "resource": resource, "request": {"method": "POST", "url": resource["resourceType"]}}
            for url, resource in entries
        ],
    }


def resource(of: dict[str, Any], index: int) -> dict[str, Any]:
    """The resource of an entry, to be changed."""
    found: dict[str, Any] = of["entry"][index]["resource"]
    return found


def write(folder: Path, name: str, content: object) -> Path:
    """Writes a JSON file into a folder."""
    path = folder / name
    path.write_text(json.dumps(content))
    return path
