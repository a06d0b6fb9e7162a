"""Reads FHIR R4 transaction bundles into the records that the directory and the registry of patients take."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson

from system.importing.places import phone_line, zone_of

Json = dict[str, Any]

SYNTHEA = "https://github.com/synthetichealth/synthea"
NPI = "http://hl7.org/fhir/sid/us-npi"
_SSN = "http://hl7.org/fhir/sid/us-ssn"
_V2_0203 = ("http://terminology.hl7.org/CodeSystem/v2-0203", "http://hl7.org/fhir/v2/0203")
_GEOLOCATION = "http://hl7.org/fhir/StructureDefinition/geolocation"
_INTERPRETER = "http://hl7.org/fhir/StructureDefinition/patient-interpreterRequired"
_KNOWN_EXTENSION = re.compile(r"^https?://(?:hl7\.org|[a-z.]*synthetichealth[a-z.]*)/[\w./-]*?([\w-]+)$")

SECRET_TYPES = frozenset({"SS", "DL", "PPN"})
"""Types of identifiers that are dropped unless enabled: social security, driver's licence, passport."""

_DATE = re.compile(r"^\d{4}(?:-\d{2}(?:-\d{2})?)?$")
_INSTANT = re.compile(r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:\d{2})$")
_BCP47 = re.compile(r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")
_TYPE_NAME = re.compile(r"^[A-Z][A-Za-z]{2,39}$")

_NAME_USES = ("usual", "official", "temp", "nickname", "anonymous", "old", "maiden")
_LESSER_NAMES = ("TEMP", "ANONYMOUS", "OLD", "MAIDEN")
_ADDRESS_USES = ("home", "work", "temp", "old", "billing")
_TELECOM_SYSTEMS = ("phone", "fax", "email", "pager", "url", "sms", "other")
_TELECOM_USES = ("home", "work", "temp", "old", "mobile")
_GENDERS = ("male", "female", "other", "unknown")
_NO_VISIT = ("cancelled", "entered-in-error")
_NOT_SEEN_AT = ("pay", "ins")  # Synthea's and HL7's organization-type of payers


class Key(NamedTuple):
    """A business identifier: URI of the issuer and value."""

    system: str
    value: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How bundles are read.

    A patient's record is matched on the identifier of `issuer` with the type `MR`. Fallback: where no identifier of
    that issuer has a type at all, its only one is taken. Never another issuer's, never one of another type: a record
    without either is broken. `keep` names the secret identifier types (SECRET_TYPES) that are brought in.
    """

    issuer: str = "http://hospital.smarthealthit.org"
    keep: frozenset[str] = frozenset()
    phone_region: str = "US"
    source_system: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """Something odd that stops nothing: entry, resource type, JSON path and what, never a value."""

    entry: int
    resource: str
    path: str
    what: str


@dataclass(frozen=True, slots=True)
class ClinicRead:
    """An Organization as proto3 JSON of `care.scheduling.v1.Clinic`; its `timeZone` is derived, not stated."""

    key: Key
    record: Json
    entry: int


@dataclass(frozen=True, slots=True)
class PractitionerRead:
    """A Practitioner as proto3 JSON of `care.scheduling.v1.Practitioner`, without roles: `clinics` are those of the encounters."""

    key: Key
    record: Json
    entry: int
    clinics: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class PatientRead:
    """A Patient as proto3 JSON of `care.patients.v1.Patient`; `clinics` come from Encounter.serviceProvider.

    `timeZone` is absent where neither coordinates nor postal code nor state tell it: the clinic's is for the loader.
    """

    key: Key
    record: Json
    entry: int
    clinics: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class BundleRead:
    """What one bundle holds for us, with notes and counts by kind of what was skipped."""

    path: Path
    clinics: tuple[ClinicRead, ...]
    practitioners: tuple[PractitionerRead, ...]
    patients: tuple[PatientRead, ...]
    notes: tuple[Note, ...]
    skipped: Counter[str]


class BundleBroken(Exception):
    """A bundle that can't be read: file, index of the entry and resource type (if one is to blame), JSON path, what is wrong.

    It never holds a value of the record.
    """

    def __init__(self, file: str, entry: int | None, resource: str, path: str, what: str) -> None:
        self.file, self.entry, self.resource, self.path, self.what = file, entry, resource, path, what
        place = f"entry {entry} ({resource}): " if entry is not None else ""
        super().__init__(f"{file}: {place}{path}: {what}")


class _Wrong(Exception):
    def __init__(self, path: str, what: str) -> None:
        self.path, self.what = path, what
        super().__init__(f"{path}: {what}")


class _Node:
    """A value of the bundle and its JSON path; reading one of the wrong type raises _Wrong."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str) -> None:
        self.value, self.path = value, path

    def wrong(self, what: str) -> _Wrong:
        return _Wrong(self.path, what)

    def child(self, name: str) -> "_Node | None":
        value = self.value.get(name)
        return None if value is None else _Node(value, f"{self.path}.{name}" if self.path else name)

    def object(self, name: str) -> "_Node | None":
        node = self.child(name)
        if node is not None and not isinstance(node.value, dict):
            raise node.wrong("must be an object")
        return node

    def objects(self, name: str) -> "list[_Node]":
        node = self.child(name)
        if node is None:
            return []
        if not isinstance(node.value, list):
            raise node.wrong("must be a list")
        items = [_Node(value, f"{node.path}[{number}]") for number, value in enumerate(node.value)]
        for item in items:
            if not isinstance(item.value, dict):
                raise item.wrong("must be an object")
        return items

    def text(self, name: str, longest: int = 200) -> str | None:
        node = self.child(name)
        return None if node is None else node.as_text(longest)

    def as_text(self, longest: int) -> str:
        if not isinstance(self.value, str):
            raise self.wrong("must be a string")
        text = self.value.strip()
        if not text:
            raise self.wrong("must not be empty")
        if len(text) > longest:
            raise self.wrong(f"is longer than {longest} characters")
        if "\0" in text:
            raise self.wrong("holds a NUL character")
        return text

    def texts(self, name: str, longest: int, most: int) -> list[str]:
        node = self.child(name)
        if node is None:
            return []
        if not isinstance(node.value, list):
            raise node.wrong("must be a list")
        if len(node.value) > most:
            raise node.wrong(f"has more than {most} items")
        return [_Node(value, f"{node.path}[{number}]").as_text(longest) for number, value in enumerate(node.value)]

    def need(self, name: str, longest: int = 200) -> str:
        text = self.text(name, longest)
        if text is None:
            raise _Wrong(f"{self.path}.{name}" if self.path else name, "is missing")
        return text

    def choice(self, name: str, allowed: tuple[str, ...]) -> str | None:
        text = self.text(name)
        if text is not None and text not in allowed:
            raise _Wrong(f"{self.path}.{name}", f"must be one of {', '.join(allowed)}")
        return text

    def boolean(self, name: str) -> bool | None:
        value = self.value.get(name)
        if value is not None and not isinstance(value, bool):
            raise _Wrong(f"{self.path}.{name}", "must be true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.value.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Wrong(f"{self.path}.{name}", "must be a number")
        if not least <= value <= most:
            raise _Wrong(f"{self.path}.{name}", f"must be from {least:g} to {most:g}")
        return float(value)

    def day(self, name: str) -> str | None:
        """A date as precise as given; of an instant only its day."""
        text = self.text(name)
        if text is None:
            return None
        path = f"{self.path}.{name}"
        if not _DATE.match(text):
            if not _INSTANT.match(text):
                raise _Wrong(path, "must be YYYY, YYYY-MM, YYYY-MM-DD or an instant with its offset")
            try:
                datetime.fromisoformat(text)
            except ValueError:
                raise _Wrong(path, "is no time of the calendar") from None
            text = text[:10]
        year, month, day = ([int(part) for part in text.split("-")] + [1, 1])[:3]
        try:
            date(year, month, day)
        except ValueError:
            raise _Wrong(path, "is no day of the calendar") from None
        return text


def _without_nothing(record: Json) -> Json:
    return {name: value for name, value in record.items() if value is not None and value != [] and value != {}}


def npi_check_digit_fits(npi: str) -> bool:
    """Whether ten digits end in the Luhn digit over 80840 and the first nine (CMS, NPI check digit)."""
    if not re.fullmatch(r"\d{10}", npi):
        return False
    digits = [int(digit) for digit in "80840" + npi]
    doubled = (sum(divmod(2 * digit, 10)) if place % 2 else digit for place, digit in enumerate(reversed(digits)))
    return sum(doubled) % 10 == 0


def _coded(node: _Node | None, systems: tuple[str, ...] | None = None) -> str | None:
    """The first code of a CodeableConcept, only of `systems` where given."""
    if node is None:
        return None
    for coding in node.objects("coding"):
        if (code := coding.text("code")) and (systems is None or coding.text("system") in (*systems, None)):
            return code
    return None


def _extensions(node: _Node, url: str) -> Iterator[_Node]:
    return (extension for extension in node.objects("extension") if extension.text("url", 500) == url)


@dataclass(slots=True)
class _Reading:
    """One bundle while it is read; `entry` and `resource` say where we are."""

    rules: Rules
    notes: list[Note] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    targets: dict[str, tuple[str, Key | None]] = field(default_factory=dict)
    aliases: dict[tuple[str, Key], Key] = field(default_factory=dict)
    entry: int | None = None
    resource: str = ""

    def note(self, path: str, what: str) -> None:
        self.notes.append(Note(self.entry if self.entry is not None else -1, self.resource, path, what))

    def capped(self, items: list[Any], most: int, kind: str) -> list[Any]:
        self.skipped[f"{kind} past {most}"] += max(0, len(items) - most)
        return items[:most]

    # -- data types

    def identifiers(self, node: _Node, most: int) -> list[Json]:
        kind, found = f"{self.resource}.identifier", []
        for identifier in node.objects("identifier"):
            system, value = identifier.text("system"), identifier.text("value", 100)
            if system is None or value is None:
                self.skipped[f"{kind} without system or value"] += 1
                continue
            type_ = _coded(identifier.object("type"), _V2_0203)
            secret = _secret_type(system, type_)
            if secret and secret not in self.rules.keep:
                self.skipped[f"{kind} {secret}"] += 1
            else:
                found.append(
                    _without_nothing({"system": system, "value": value, "type": (type_ or secret or "")[:20] or None})
                )
        return self.capped(found, most, kind)

    def period(self, node: _Node) -> Json | None:
        """FHIR's end is inside the period, ours is the first instant after it: a day ends with the next midnight."""
        period = node.object("period")
        if period is None:
            return None
        found = {}
        for name, ours in (("start", "startTime"), ("end", "endTime")):
            text, day = period.text(name), period.day(name)
            if text is None or day is None:
                continue
            if len(day) < 10:
                self.skipped[f"{self.resource} period without a day"] += 1
                continue
            whole_day = len(text) == 10
            instant = datetime.fromisoformat(text).replace(tzinfo=UTC) if whole_day else datetime.fromisoformat(text)
            seconds = int(instant.timestamp()) + (86_400 if whole_day and name == "end" else 0)
            found[ours] = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return found or None

    def name(self, node: _Node) -> Json:
        use = node.choice("use", _NAME_USES)
        family, given = node.text("family", 100), node.texts("given", 100, 10)
        if family is None and not given:
            # Only as one text: searched like a family name.
            family = node.text("text", 100)
            if family is None:
                raise node.wrong("needs a family, given or text")
        return _without_nothing(
            {
                "use": use.upper() if use else None,
                "familyName": family,
                "givenNames": given,
                "prefixes": node.texts("prefix", 50, 5),
                "suffixes": node.texts("suffix", 50, 5),
                "period": self.period(node),
            }
        )

    def names(self, node: _Node) -> list[Json]:
        names = [self.name(name) for name in node.objects("name")]
        if not names:
            raise _Wrong(f"{node.path}.name", "is missing")
        names.sort(key=lambda name: name.get("use") in _LESSER_NAMES)  # the first one is shown
        return self.capped(names, 10, f"{self.resource}.name")

    def telecom(self, node: _Node, most: int) -> list[Json]:
        """Contact points. What is no number is kept raw: no record is refused for its phone."""
        kind, found = f"{self.resource}.telecom", []
        for point in node.objects("telecom"):
            raw = point.child("value")
            if raw is None or (isinstance(raw.value, str) and not 0 < len(raw.value.strip()) <= 200):
                self.skipped[f"{kind} without a usable value"] += 1
                continue
            value = raw.as_text(200)
            system = point.text("system") or ("email" if "@" in value else "phone")
            use, rank = point.text("use"), point.value.get("rank")
            record: Json = {
                "system": system.upper() if system in _TELECOM_SYSTEMS else "OTHER",
                "value": value,
                "use": use.upper() if use in _TELECOM_USES and use else None,
                "rank": rank if isinstance(rank, int) and 0 < rank <= 99 else None,
            }
            if system in ("phone", "sms", "fax", "pager"):
                record["e164"], record["lineType"] = phone_line(value, self.rules.phone_region)
                if record["lineType"] == "INVALID":
                    self.note(f"{point.path}.value", "no number that can exist; kept as written")
            found.append(_without_nothing(record))
        return self.capped(found, most, kind)

    def address(self, node: _Node) -> Json:
        use = node.choice("use", _ADDRESS_USES)
        latitude = longitude = None
        for extension in _extensions(node, _GEOLOCATION):
            for part in extension.objects("extension"):
                if part.text("url", 500) == "latitude":
                    latitude = part.number("valueDecimal", -90, 90)
                elif part.text("url", 500) == "longitude":
                    longitude = part.number("valueDecimal", -180, 180)
        lines = node.texts("line", 200, 5)
        if not lines and (text := node.text("text")):
            lines = [text]
        both = latitude is not None and longitude is not None
        return _without_nothing(
            {
                "use": use.upper() if use else None,
                "lines": lines,
                "city": node.text("city", 100),
                "district": node.text("district", 100),
                "state": node.text("state", 100),
                "postalCode": node.text("postalCode", 20),
                "country": node.text("country", 60),
                "latitude": latitude if both else None,
                "longitude": longitude if both else None,
                "period": self.period(node),
            }
        )

    def addresses(self, node: _Node, most: int) -> list[Json]:
        found = [address for part in node.objects("address") if (address := self.address(part))]
        found.sort(key=lambda address: address.get("use") in ("OLD", "BILLING"))  # the first one gives the zone
        return self.capped(found, most, f"{self.resource}.address")

    def languages(self, codes: list[tuple[_Node, bool]], most: int) -> list[str]:
        """BCP-47 codes of CodeableConcepts, preferred first."""
        found: list[str] = []
        for concept, _ in sorted(codes, key=lambda pair: not pair[1]):
            code = _coded(concept, ("urn:ietf:bcp:47",))
            if code is None or not _BCP47.match(code):
                self.skipped[f"{self.resource} language without a BCP-47 code"] += 1
            elif code not in found:
                found.append(code)
        return self.capped(found, most, f"{self.resource} language")

    def labels(self, node: _Node) -> list[str]:
        meta = node.object("meta")
        codes = [label.text("code", 40) for label in meta.objects("security")] if meta else []
        return [code for code in codes if code][:10]

    # -- resources

    def clinic(self, node: _Node) -> ClinicRead | None:
        for concept in node.objects("type"):
            if _coded(concept) in _NOT_SEEN_AT:
                self.skipped["Organization that insures"] += 1
                return None
        identifiers = self.identifiers(node, 10)
        if not identifiers:
            raise _Wrong(f"{node.path}.identifier", "needs one with system and value")
        addresses = self.addresses(node, 1)
        zone = next((zone for address in addresses if (zone := zone_of(address))), None)
        if zone is None:
            self.note(f"{node.path}.address", "tells no time zone; give the clinic one by --clinics FILE")
        record = {
            "identifiers": identifiers,
            "name": node.need("name"),
            "timeZone": zone[0] if zone else None,
            "address": addresses[0] if addresses else None,
            "telecom": self.telecom(node, 10),
            "status": "INACTIVE" if node.boolean("active") is False else None,
            "securityLabels": self.labels(node),
            "sourceSystem": self.rules.source_system or None,
        }
        return ClinicRead(_key(identifiers[0]), _without_nothing(record), self.entry or 0)

    def practitioner(self, node: _Node) -> PractitionerRead:
        identifiers = self.identifiers(node, 10)
        if not identifiers:
            raise _Wrong(f"{node.path}.identifier", "needs one with system and value")
        identifiers.sort(key=lambda identifier: (identifier["system"] != NPI, identifier["system"] != SYNTHEA))
        for identifier in identifiers:
            if identifier["system"] == NPI:
                identifier.setdefault("type", "NPI")
                if not npi_check_digit_fits(identifier["value"]):
                    self.note(f"{node.path}.identifier", "an NPI whose check digit doesn't fit; taken as it is")
        record = {
            "identifiers": identifiers,
            "name": self.names(node)[0],
            "languages": self.languages([(concept, False) for concept in node.objects("communication")], 20),
            "gender": node.choice("gender", _GENDERS),
            "active": False if node.boolean("active") is False else None,
            "sourceSystem": self.rules.source_system or None,
        }
        for unused in ("telecom", "address", "birthDate", "photo", "qualification"):
            self.skipped[f"Practitioner.{unused}"] += unused in node.value
        return PractitionerRead(_key(identifiers[0]), _without_nothing(record), self.entry or 0)

    def patient(self, node: _Node) -> PatientRead:
        identifiers = self.identifiers(node, 20)
        key = self.record_number(node, identifiers)
        identifiers.sort(key=lambda identifier: _key(identifier) != key)
        gender, birth_date, dead = node.choice("gender", _GENDERS), node.day("birthDate"), node.day("deceasedDateTime")
        if birth_date is None:
            self.note(f"{node.path}.birthDate", "is missing")
        elif birth_date > date.today().isoformat():  # as the day is here; a day off costs a note
            self.note(f"{node.path}.birthDate", "is in the future")
        if dead and birth_date and dead < birth_date[: len(dead)]:
            self.note(f"{node.path}.deceasedDateTime", "is before the birth date")
        languages = []
        for communication in node.objects("communication"):
            concept = communication.object("language")
            if concept is not None:
                languages.append((concept, communication.boolean("preferred") is True))
        addresses = self.addresses(node, 10)
        zone = next((zone for address in addresses if (zone := zone_of(address))), None)
        record = {
            "identifiers": identifiers,
            "names": self.names(node),
            "telecom": self.telecom(node, 20),
            "gender": gender.upper() if gender else None,
            "birthDate": birth_date,
            "addresses": addresses,
            "languages": self.languages(languages, 10),
            "interpreterNeeded": any(part.boolean("valueBoolean") for part in _extensions(node, _INTERPRETER)) or None,
            "timeZone": zone[0] if zone else None,
            "timeZoneSource": zone[1] if zone else None,
            "deceased": (dead is not None or node.boolean("deceasedBoolean") is True) or None,
            "deceasedDate": dead,
            "active": node.boolean("active"),
            "securityLabels": self.labels(node),
            "sourceSystem": self.rules.source_system or None,
        }
        for extension in node.objects("extension"):
            url = extension.text("url", 500)
            if url not in (_INTERPRETER, None):
                known = _KNOWN_EXTENSION.match(url or "")
                self.skipped[f"Patient.extension {known[1] if known else 'of other issuers'}"] += 1
        for unused in ("contact", "generalPractitioner", "link", "maritalStatus", "photo"):
            self.skipped[f"Patient.{unused}"] += unused in node.value
        return PatientRead(key, _without_nothing(record), self.entry or 0, ())

    def record_number(self, node: _Node, identifiers: list[Json]) -> Key:
        ours = [identifier for identifier in identifiers if identifier["system"] == self.rules.issuer]
        numbers = [identifier for identifier in ours if identifier.get("type") == "MR"]
        if not numbers and len(ours) == 1 and "type" not in ours[0]:
            self.note(f"{node.path}.identifier", "the configured issuer's number has no type; taken as MR")
            ours[0]["type"] = "MR"
            numbers = ours
        if len({_key(number) for number in numbers}) != 1:
            count = "none" if not numbers else "several"
            raise _Wrong(f"{node.path}.identifier", f"needs one of type MR by the configured issuer, has {count}")
        return _key(numbers[0])

    # -- references

    def refer(self, node: _Node | None, type_: str) -> Key | None:
        """The identifier of what a Reference points at; None (and counted) where it lies outside of the bundle."""
        if node is None:
            return None
        reference = node.text("reference", 500)
        if reference is None:
            logical = node.object("identifier")
            if logical is None:
                raise node.wrong("needs a reference or an identifier")
            key = Key(logical.need("system"), logical.need("value", 100))
            return self.aliases.get((type_, key), key)
        if match := re.fullmatch(r"([A-Za-z]+)\?identifier=(.+)", reference):
            system, bar, value = unquote(match[2]).partition("|")
            if match[1] != type_ or not (bar and system and value):
                raise _Wrong(f"{node.path}.reference", f"must be {type_}?identifier=system|value")
            return self.aliases.get((type_, Key(system, value)), Key(system, value))
        short = "/".join(reference.split("/_history/")[0].rsplit("/", 2)[-2:])
        target = self.targets.get(reference) or self.targets.get(short)
        if target is None:
            if reference.startswith("urn:"):
                raise _Wrong(f"{node.path}.reference", "points at nothing in the bundle")
            self.skipped[f"{self.resource} reference outside of the bundle"] += 1
            return None
        if target[0] != type_:
            raise _Wrong(f"{node.path}.reference", f"must point at one of type {type_}")
        return target[1]


def _secret_type(system: str, type_: str | None) -> str | None:
    """Social security number, driver's licence or passport, told by type or by issuer; None for others."""
    if type_ in SECRET_TYPES:
        return type_
    if type_ == "SB" or system == _SSN or system == "urn:oid:2.16.840.1.113883.4.1":
        return "SS"
    if system.startswith("urn:oid:2.16.840.1.113883.4.3."):
        return "DL"
    if "passport" in system.casefold() or system.startswith("urn:oid:2.16.840.1.113883.4.330"):
        return "PPN"
    return None


def _key(identifier: Mapping[str, Any]) -> Key:
    return Key(identifier["system"], identifier["value"])


def read_bundle(path: Path, rules: Rules | None = None) -> BundleRead:
    """Reads and checks a whole bundle (type transaction or batch). Nothing of a broken one comes back: BundleBroken."""
    reading = _Reading(rules or Rules())
    try:
        return _read(path, reading)
    except _Wrong as wrong:
        raise BundleBroken(path.name, reading.entry, reading.resource, wrong.path, wrong.what) from None
    except RecursionError:
        raise BundleBroken(path.name, reading.entry, reading.resource, "$", "is nested too deep") from None


def _read(path: Path, reading: _Reading) -> BundleRead:
    try:
        bundle = _Node(orjson.loads(path.read_bytes()), "")
    except orjson.JSONDecodeError as error:
        raise _Wrong("$", f"no JSON: line {error.lineno}, column {error.colno}") from None
    except OSError as error:
        raise _Wrong("$", f"can't be read: {error.strerror}") from None
    if not isinstance(bundle.value, dict) or bundle.value.get("resourceType") != "Bundle":
        raise _Wrong("resourceType", "must be Bundle")
    if bundle.value.get("type") not in ("transaction", "batch"):
        raise _Wrong("type", "must be transaction or batch")
    resources = list(_resources(bundle, reading))
    clinics: dict[Key, ClinicRead] = {}
    practitioners: dict[Key, PractitionerRead] = {}
    patients: dict[Key, PatientRead] = {}
    encounters: list[tuple[int, _Node]] = []
    for index, node, full_url in resources:
        reading.entry, reading.resource = index, node.value["resourceType"]
        found: ClinicRead | PractitionerRead | PatientRead | None = None
        match reading.resource:
            case "Organization":
                if (found := reading.clinic(node)) is not None:
                    clinics.setdefault(found.key, found)
            case "Practitioner":
                found = reading.practitioner(node)
                practitioners.setdefault(found.key, found)
            case "Patient":
                found = reading.patient(node)
                if found.key in patients:
                    raise _Wrong(f"{node.path}.identifier", "the record number stands in the bundle twice")
                patients[found.key] = found
            case "Encounter":
                encounters.append((index, node))
                continue
            case other:
                reading.skipped[other] += 1
        target = (reading.resource, found.key if found else None)
        if found:
            for identifier in found.record["identifiers"]:
                reading.aliases.setdefault((reading.resource, _key(identifier)), found.key)
        names = [full_url] if full_url else []
        if identity := node.text("id"):
            names.append(f"{reading.resource}/{identity}")
        for name in names:
            if reading.targets.setdefault(name, target) is not target:
                raise _Wrong(f"entry[{index}].fullUrl", "another entry has the same")
    seen, works = _relations(encounters, reading)
    by_entry = {patient.entry: patient for patient in patients.values()}
    for index, node, _ in resources:
        reading.entry, reading.resource = index, node.value["resourceType"]
        if reading.resource == "Patient":
            patient = by_entry[index]
            home = reading.refer(node.object("managingOrganization"), "Organization")
            related = dict.fromkeys([*seen.get(patient.key, ()), *([home] if home else [])])
            if not related:
                raise _Wrong(node.path, "no encounter's serviceProvider and no managingOrganization names a clinic")
            patients[patient.key] = PatientRead(patient.key, patient.record, index, tuple(sorted(related)))
    return BundleRead(
        path,
        tuple(clinics.values()),
        tuple(
            PractitionerRead(one.key, one.record, one.entry, tuple(sorted(works.get(one.key, ()))))
            for one in practitioners.values()
        ),
        tuple(patients.values()),
        tuple(reading.notes),
        +reading.skipped,
    )


def _resources(bundle: _Node, reading: _Reading) -> Iterator[tuple[int, _Node, str | None]]:
    for index, entry in enumerate(bundle.objects("entry")):
        reading.entry, reading.resource = index, "?"
        resource = entry.object("resource")
        if resource is None:
            raise _Wrong(f"{entry.path}.resource", "is missing")
        kind = resource.need("resourceType")
        if not _TYPE_NAME.match(kind):
            raise _Wrong(f"{resource.path}.resourceType", "names no type of resource")
        reading.resource = kind
        request = entry.object("request")
        if request is not None and request.need("method") not in ("POST", "PUT"):
            raise _Wrong(f"{request.path}.method", "must be POST or PUT")
        yield index, resource, entry.text("fullUrl", 500)
    reading.entry, reading.resource = None, ""


def _relations(
    encounters: list[tuple[int, _Node]], reading: _Reading
) -> tuple[dict[Key, set[Key]], dict[Key, set[Key]]]:
    """Clinics by patient and by practitioner. An encounter says them; the rest of it is skipped and counted."""
    seen: dict[Key, set[Key]] = {}
    works: dict[Key, set[Key]] = {}
    for index, node in encounters:
        reading.entry, reading.resource = index, "Encounter"
        reading.skipped["Encounter (only its relation is taken)"] += 1
        if node.text("status") in _NO_VISIT:
            continue
        patient = reading.refer(node.object("subject"), "Patient")
        clinic = reading.refer(node.object("serviceProvider"), "Organization")
        if patient is None or clinic is None:
            continue
        seen.setdefault(patient, set()).add(clinic)
        for participant in node.objects("participant"):
            individual = participant.object("individual")
            if individual is None or "PractitionerRole" in (individual.text("reference", 500) or ""):
                continue
            kind, practitioner = reading.targets.get(individual.text("reference", 500) or "", ("Practitioner", None))
            if kind == "Practitioner":
                if practitioner := practitioner or reading.refer(individual, "Practitioner"):
                    works.setdefault(practitioner, set()).add(clinic)
    return seen, works
