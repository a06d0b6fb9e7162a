"""Made-up people and questionnaires of the sample tenant, as proto3 JSON: nobody exists, phones are the fictional 555-01xx."""

from typing import Any

Json = dict[str, Any]

CLINIC_SYSTEM = "urn:care:sample:clinic"
PATIENT_SYSTEM = "urn:care:sample:patient"
CLINICS = ("riverbend", "lakefield", "mesa-verde")

# role: given name, family name, credentials, clinical
STAFF: dict[str, tuple[str, str, list[str], bool]] = {
    "coordinator": ("Imani", "Castellane", ["RN"], True),
    "scheduler": ("Otto", "Verhagen", [], False),
    "front_desk": ("Delphine", "Marsh", [], False),
    "nurse": ("Kofi", "Lindgren", ["RN"], True),
    "clinician": ("Adaeze", "Okonjo", ["MD"], True),
    "manager": ("Rosalind", "Achterberg", [], False),
    "quality": ("Tomas", "Quill", [], False),
    "privacy_officer": ("Beatrix", "Sandoval", ["CHPS"], False),
    "integration_client": ("Interface", "Engine", [], False),
    "external_partner": ("Leopold", "Farris", [], False),
}
# name: purpose and the roles of its members
POOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Care coordination": ("coordination", ("coordinator", "scheduler", "front_desk", "manager")),
    "Referrals": ("referrals", ("coordinator", "nurse", "manager")),
    "Urgent": ("urgent", ("nurse", "clinician", "coordinator")),
    "Privacy": ("privacy", ("privacy_officer",)),
}

# given, family, gender, birth date, languages; ten per clinic in the order of CLINICS
_PATIENTS = (
    ("Marguerite", "Halloway", "FEMALE", "1948-03-11", "en-US"),
    ("Jasper", "Noordwijk", "MALE", "1961-07-29", "en-US"),
    ("Soledad", "Quiroga", "FEMALE", "1979-11-02", "es"),
    ("Emmanuel", "Adeyinka", "MALE", "1990-01-23", "en-US"),
    ("Wren", "Castellano", "OTHER", "1999-05-17", "en-US"),
    ("Ludmila", "Petrakova", "FEMALE", "1955-09-30", "ru"),
    ("Cornelius", "Beech", "MALE", "1937-12-08", "en-US"),
    ("Anjali", "Venkatesh", "FEMALE", "1984-02-14", "en-US"),
    ("Theo", "Marchetti", "MALE", "2016-06-05", "en-US"),
    ("Philippa", "Grange", "FEMALE", "1972-10-19", "en-US"),
    ("Orson", "Whitlock", "MALE", "1958-04-03", "en-US"),
    ("Guadalupe", "Ibarra", "FEMALE", "1967-08-21", "es"),
    ("Nils", "Engstrom", "MALE", "1945-01-31", "en-US"),
    ("Fatoumata", "Diarra", "FEMALE", "1993-03-27", "fr"),
    ("Caspian", "Rowe", "MALE", "2004-11-11", "en-US"),
    ("Harriet", "Osei", "FEMALE", "1951-06-16", "en-US"),
    ("Xiulan", "Zheng", "FEMALE", "1949-02-06", "zh"),
    ("Dominic", "Fairbairn", "MALE", "1982-12-24", "en-US"),
    ("Juniper", "Talbot", "FEMALE", "1988-07-07", "en-US"),
    ("Ezra", "Lindqvist", "MALE", "1970-05-09", "en-US"),
    ("Ramón", "Escalante", "MALE", "1963-09-13", "es"),
    ("Ottoline", "Reyes", "FEMALE", "1976-04-25", "en-US"),
    ("Delmar", "Begay", "MALE", "1954-10-02", "en-US"),
    ("Inés", "Valverde", "FEMALE", "1991-08-15", "es"),
    ("August", "Kessler", "MALE", "1940-03-19", "en-US"),
    ("Noor", "Haddad", "FEMALE", "1986-01-05", "ar"),
    ("Silas", "Montrose", "MALE", "1997-06-28", "en-US"),
    ("Winifred", "Tso", "FEMALE", "1959-11-20", "en-US"),
    ("Matteo", "Figueroa", "MALE", "2012-02-29", "es"),
    ("Rosamund", "Pike-Ellis", "FEMALE", "1969-12-12", "en-US"),
)
# area code, city, state, postal code, latitude, longitude
_PLACES = (
    ("518", "Albany", "NY", "12207", 42.6526, -73.7562),
    ("217", "Springfield", "IL", "62701", 39.7990, -89.6440),
    ("602", "Phoenix", "AZ", "85004", 33.4510, -112.0686),
)


def staff(role: str, issuer: str, subject: str, clinic_ids: list[str]) -> Json:
    """A staff member who holds one role, at all clinics but for the partner, who belongs to none."""
    given, family, credentials, clinical = STAFF[role]
    return {
        "issuer": issuer,
        "subject": subject,
        "name": {"familyName": family, "givenNames": [given]},
        "credentials": credentials,
        "clinical": clinical,
        "roles": [role],
        "clinicIds": [] if role == "external_partner" else clinic_ids,
        "licensedStates": ["NY", "IL", "AZ"] if clinical else [],
    }


def patients() -> list[tuple[str, Json]]:
    """Thirty patients, each with the identifier of their clinic."""
    found = []
    for number, (given, family, gender, birth_date, language) in enumerate(_PATIENTS):
        area, city, state, postal_code, latitude, longitude = _PLACES[number // 10]
        phone = f"+1{area}55501{10 + number:02}"
        telecom: list[Json] = [
            {"system": "PHONE", "value": phone, "e164": phone, "use": "MOBILE", "rank": 1, "lineType": "MOBILE"}
        ]
        if number % 2 == 0:  # some have no e-mail address
            telecom.append({"system": "EMAIL", "value": f"patient{number + 1}@mail.example", "use": "HOME", "rank": 1})
        record = {
            "identifiers": [{"system": PATIENT_SYSTEM, "value": f"S{number + 1:04}", "type": "MR"}],
            "names": [{"use": "OFFICIAL", "familyName": family, "givenNames": [given]}],
            "gender": gender,
            "birthDate": birth_date,
            "languages": [language] if language == "en-US" else [language, "en-US"],
            "interpreterNeeded": language in ("ru", "zh", "ar"),
            "telecom": telecom,
            "addresses": [
                {
                    "use": "HOME",
                    "lines": [f"{100 + 7 * number} Example Street"],
                    "city": city,
                    "state": state,
                    "postalCode": postal_code,
                    "country": "US",
                    "latitude": latitude,
                    "longitude": longitude,
                }
            ],
            "timeZone": ("America/New_York", "America/Chicago", "America/Phoenix")[number // 10],
        }
        found.append((CLINICS[number // 10], record))
    return found


def consents(patient: Json) -> list[Json]:
    """A patient's consents: to every contact that they gave, by different ways of saying so."""
    number = int(patient["identifiers"][0]["value"][1:])
    found = []
    for contact in patient["telecom"]:
        sms = contact["system"] == "PHONE"
        found.append(
            {
                "contactValue": contact["value"],
                "channel": "SMS" if sms else "EMAIL",
                "purpose": "care",
                "basis": ("EXPRESS" if number % 2 else "WRITTEN") if sms else "EXPRESS",
                "textVersion": "sample-2026-01",
                "evidence": f"intake form S{number:04}",
            }
        )
    return found


# Who waits at each clinic: for what, whether an earlier time is wished for, and the wishes.
REQUESTS: list[Json] = [
    {
        "request": {"origin": "RECALL", "priority": "ROUTINE", "note": "Yearly check of the blood pressure"},
        "attempts": [{"outcome": "VOICEMAIL", "note": "Asked for a call back"}, {"outcome": "NO_ANSWER"}],
    },
    {"request": {"origin": "PATIENT", "priority": "URGENT"}, "attempts": []},
]
"""What is still to be scheduled for the first patients of each clinic, with the tries so far."""
WISHES: Json = {
    "weekdays": [2, 4],
    "earliest": "09:00",
    "mayBeMoved": {"withinDays": 14, "samePractitioner": True},
    "barriers": [{"code": "transport", "display": "Comes by bus"}],
}
"""How the first patient of each clinic wishes to be scheduled."""

WAITLIST: tuple[Json, ...] = (
    {
        "code": "annual-physical",
        "earlier": False,
        "entry": {"priority": "URGENT", "weekdays": [1, 2, 3, 4], "channel": "SMS", "ageBand": "18-64"},
    },
    {"code": "annual-physical", "earlier": False, "entry": {"priority": "ROUTINE", "latestTime": "12:00"}},
    {"code": "follow-up", "earlier": True, "entry": {"priority": "ROUTINE", "ageBand": "18-64"}},
)


# -- directory that no file of clinics has ---------------------------------------------------------------------------

RESOURCES: tuple[Json, ...] = (
    {
        "kind": "interpreter",
        "name": "Interpreter for Russian and Mandarin",
        "languages": ["ru", "zh"],
        "weeklyHours": [{"weekday": day, "start": "09:00", "end": "15:00"} for day in (1, 3, 5)],
    },
    {
        "kind": "gym",
        "name": "Gym",
        "weeklyHours": [{"weekday": day, "start": "08:00", "end": "20:00"} for day in range(1, 6)],
    },
    {
        "kind": "ultrasound",
        "name": "Ultrasound, shared with the hospital",
        "weeklyHours": [{"weekday": day, "start": "13:00", "end": "17:00"} for day in (2, 4)],
    },
)
"""With hours of their own, at the first clinic."""
THERAPIST: Json = {
    "name": {"familyName": "Aldous", "givenNames": ["Sunniva"]},
    "languages": ["en-US"],
    "licensedStates": ["NY"],
}
REPLACED = ((1, "08:00"), (5, "13:00"))
"""Weekdays and starts of the first practitioner's blocks in whose place stand `blocks`."""


def blocks(new_patient: str) -> list[Json]:
    """Of a Monday morning's visits two are for who is new; the end of Friday afternoon is opened two days before."""
    return [
        {"weekday": 1, "start": "08:00", "end": "12:00", "quotas": [{"atMost": 2, "visitTypeIds": [new_patient]}]},
        {"weekday": 5, "start": "13:00", "end": "15:00"},
        {"weekday": 5, "start": "15:00", "end": "17:00", "releaseHours": 48},
    ]


def _options(*texts: tuple[str, str]) -> list[Json]:
    return [{"value": value, "text": {"en": en, "es": es}} for value, (en, es) in enumerate(texts)]


_FREQUENCY = _options(
    ("Not at all", "Para nada"),
    ("Several days", "Varios días"),
    ("More than half the days", "Más de la mitad de los días"),
    ("Nearly every day", "Casi todos los días"),
)
_CRISIS_HELP = {
    "en": "If you are in danger, call 911 now. You can call or text 988 at any hour and talk to somebody.",
    "es": "Si está en peligro, llame al 911 ahora. Puede llamar al 988 a cualquier hora y hablar con alguien.",
}

QUESTIONNAIRES: tuple[Json, ...] = (
    {
        "name": "visit-satisfaction",
        "number": 1,
        "status": "ACTIVE",
        "title": {"en": "How was your visit?", "es": "¿Cómo fue su visita?"},
        "items": [
            {
                "linkId": "recommend",
                "text": {
                    "en": "How likely are you to recommend us to a friend or to family, from 0 to 10?",
                    "es": "¿Qué probabilidad hay de que nos recomiende, de 0 a 10?",
                },
                "kind": "SCALE",
                "options": [{"value": value, "text": {"en": str(value), "es": str(value)}} for value in range(11)],
                "required": True,
            },
            {
                "linkId": "since-visit",
                "text": {"en": "How have you been since the visit?", "es": "¿Cómo ha estado desde la visita?"},
                "kind": "CHOICE",
                "options": _options(
                    ("Better", "Mejor"),
                    ("The same", "Igual"),
                    ("Worse", "Peor"),
                    ("I do not feel safe", "No me siento a salvo"),
                ),
                "criticalFrom": 3,
            },
            {
                "linkId": "comment",
                "text": {"en": "What should we know?", "es": "¿Qué debemos saber?"},
                "kind": "TEXT",
            },
        ],
        "scoring": {"method": "nps", "linkIds": ["recommend"], "badAt": 6},
        "crisisHelp": _CRISIS_HELP,
        "afterVisit": True,
    },
    {
        "name": "phq-2",
        "number": 1,
        "status": "ACTIVE",
        "title": {"en": "Two questions on your mood", "es": "Dos preguntas sobre su ánimo"},
        "items": [
            {
                "linkId": "phq2-1",
                "text": {
                    "en": "Over the last 2 weeks, how often had you little interest or pleasure in doing things?",
                    "es": "En las últimas 2 semanas, ¿con qué frecuencia tuvo poco interés o placer en hacer cosas?",
                },
                "kind": "CHOICE",
                "options": _FREQUENCY,
                "required": True,
            },
            {
                "linkId": "phq2-2",
                "text": {
                    "en": "Over the last 2 weeks, how often did you feel down, depressed, or hopeless?",
                    "es": "En las últimas 2 semanas, ¿con qué frecuencia se sintió decaído, deprimido o sin esperanza?",
                },
                "kind": "CHOICE",
                "options": _FREQUENCY,
                "required": True,
            },
        ],
        "scoring": {"method": "phq-2", "linkIds": ["phq2-1", "phq2-2"], "badAt": 3},
        "crisisHelp": _CRISIS_HELP,
    },
)
