"""One patient's story through all five services, on both ways of running."""

import asyncio
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import httpx2
import pytest

from chassis.ids import new_id
from system.importing.tests import people
from tests.integration.world import Refused, User, World, until

pytestmark = [pytest.mark.integration, pytest.mark.postgres]

CARDIOLOGY = {"system": "http://snomed.info/sct", "code": "394579002", "display": "Cardiology"}
CLINICS = {
    "clinics": [
        {
            "identifier": "story-east",
            "name": "Harbor Street Clinic",
            "time_zone": "America/New_York",
            "holiday_region": "US-MA",
            "hours": ["Mo-Su 00:00-12:00", "Mo-Su 12:00-00:00"],
            "specialties": ["394579002|Cardiology"],
            "rooms": ["exam-room:Room 1", "exam-room:Room 2"],
            "state": "MA",
            "country": "US",
        },
        {
            "identifier_system": "urn:example:clinics",
            "identifier": "story-west",
            "name": "Front Range Clinic",
            "time_zone": "America/Denver",
            "holiday_region": "US-CO",
            "hours": ["Mo-Su 00:00-12:00", "Mo-Su 12:00-00:00"],
            "specialties": ["394579002|Cardiology"],
            "rooms": ["exam-room:Room A"],
            "state": "CO",
            "country": "US",
        },
    ],
    "visit_types": [
        {
            "code": "story-consult",
            "name": "Cardiology consultation",
            "discreet_name": "Consultation",
            "duration_minutes": 20,
            "modality": "IN_PERSON",
            "resource_kinds": ["exam-room"],
            "specialty": "394579002|Cardiology",
            "start_grid_minutes": 5,
        }
    ],
    "practitioners": [
        {
            "identifier": "1234567893",
            "family_name": "Muster",
            "given_names": ["Ole"],
            "roles": [
                {"clinic": "story-east", "specialties": ["394579002|Cardiology"]},
            ],
        },
        {
            "identifier": "1987654328",
            "family_name": "Vale",
            "given_names": ["Petra"],
            "roles": [
                {
                    "clinic_system": "urn:example:clinics",
                    "clinic": "story-west",
                    "specialties": ["394579002|Cardiology"],
                },
            ],
        },
    ],
}


@pytest.fixture(params=["embedded", "kafka"])
async def world(request: pytest.FixtureRequest, systems: Any) -> Any:
    kafka = request.param == "kafka"
    world = World(await systems(kafka=kafka))
    yield world
    await world.close()


async def care(world: World, *arguments: str, role: str = "integration_client") -> tuple[int, str]:
    """Run the `care` command against the system as somebody; answers its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "system.cli",
        *arguments,
        env={**os.environ, "CARE_URL": world.system.url, "CARE_TOKEN": world.system.token(role), "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def test_one_patients_story(world: World, tmp_path: Path) -> None:
    kept = await imported(world, tmp_path)
    coordinator, ids = await staffed(world, kept)
    patient = await intake(coordinator, ids)
    referral = await referred(coordinator, ids, patient)
    appointment = await booked(world, coordinator, ids, patient, referral)
    appointment = await moved_and_confirmed(world, coordinator, ids, appointment, referral)
    await seen(coordinator, appointment, referral)
    await surveyed(world, coordinator, ids, patient, appointment)
    await closed(world, coordinator, ids, referral)
    await missed(coordinator, ids)
    await summed_up(world, coordinator, patient)


async def imported(world: World, folder: Path) -> dict[str, Any]:
    """1. The bundles come in; a broken one is reported and nothing of its patient is kept."""
    bundles = folder / "bundles"
    bundles.mkdir()
    for number in (1, 2):
        people.write(bundles, f"{number}.json", people.bundle(number, clinic="story-east"))
    broken = people.bundle(3, clinic="story-east")
    people.resource(broken, people.PATIENT)["birthDate"] = "not-a-date"
    people.write(bundles, "3.json", broken)
    clinics = folder / "clinics.json"
    clinics.write_text(json.dumps(CLINICS))
    status, printed = await care(world, "import", str(bundles), "--clinics", str(clinics))
    assert status == 1, printed
    assert "3.json" in printed and "birthDate" in printed
    assert "not-a-date" not in printed
    importer = world.user("integration_client")
    (bundles / "3.json").unlink()
    status, printed = await care(world, "import", str(bundles), "--clinics", str(clinics))
    assert status == 0, printed
    listed = (await importer.get("/v1/clinics", pageSize=200))["clinics"]
    by_identifier = {one["identifiers"][0]["value"]: one for one in listed if one.get("identifiers")}
    return {
        "east": by_identifier["story-east"],
        "west": by_identifier["story-west"],
        "printed": printed,
    }


async def staffed(world: World, kept: dict[str, Any]) -> tuple[User, dict[str, Any]]:
    """A coordinator of both clinics, and a pool for cardiology."""
    admin = world.user("admin")
    subject = f"story-coordinator-{new_id()}"
    clinics = [kept["east"]["id"], kept["west"]["id"]]
    staff = await admin.post(
        "/v1/staff",
        {
            "issuer": "https://issuer.care.localhost",
            "subject": subject,
            "name": {"familyName": "Ashgrove", "givenNames": ["Mina"]},
            "roles": ["coordinator", "manager", "clinician"],
            "clinicIds": clinics,
        },
    )
    pool = await admin.post(
        "/v1/pools",
        {
            "name": f"Cardiology referrals {new_id()}",
            "purpose": "referrals",
            "staffIds": [staff["id"]],
            "specialtyCodes": [CARDIOLOGY["code"]],
        },
    )
    coordinator = world.user(subject=subject)
    visit_types = (await coordinator.get("/v1/visitTypes", pageSize=200))["visitTypes"]
    ids = {
        "east": clinics[0],
        "west": clinics[1],
        "staff": staff["id"],
        "pool": pool["id"],
        "visit_type": next(one["id"] for one in visit_types if one["code"] == "story-consult"),
    }
    return coordinator, ids


def where_it_is_noon() -> str:
    """A zone in which no quiet hours are now, whenever the test runs."""
    hours = 12 - datetime.now(UTC).hour
    return "UTC" if hours == 0 else f"Etc/GMT{'-' if hours > 0 else '+'}{abs(hours)}"


async def found(coordinator: User, family_name: str) -> dict[str, Any]:
    """The match card of one of the imported patients; the other one sounds alike."""
    answer = await coordinator.post("/v1/patients:search", {"familyName": family_name, "birthDate": "1980-02-29"})
    (card,) = [one for one in answer["matches"] if one["name"]["familyName"] == family_name]
    return card


async def intake(coordinator: User, ids: dict[str, Any]) -> dict[str, Any]:
    """2. Mobile and e-mail by PATCH with If-Match; consents with their evidence."""
    card = await found(coordinator, "Beispiel1")
    assert card["readable"] is True
    patient = await coordinator.get(f"/v1/patients/{card['id']}")
    assert patient["clinicIds"] == [ids["east"]]
    telecom = [
        *patient["telecom"],
        {"system": "PHONE", "value": "617-555-2368", "use": "MOBILE", "rank": 1, "lineType": "MOBILE"},
    ]
    unconditional = await coordinator.request("PATCH", f"/v1/patients/{patient['id']}", {"telecom": telecom})
    assert unconditional.status_code == 428
    patient = await coordinator.patch(
        f"/v1/patients/{patient['id']}",
        {"telecom": telecom, "languages": ["es"], "timeZone": where_it_is_noon()},
        patient["etag"],
    )
    stale = await coordinator.request("PATCH", f"/v1/patients/{patient['id']}", {"languages": ["fr"]}, if_match='"1"')
    assert stale.status_code == 412
    email = next(one["value"] for one in patient["telecom"] if one["system"] == "EMAIL")
    for channel, value in (("SMS", "617-555-2368"), ("EMAIL", email)):
        consent = await coordinator.post(
            "/v1/consents",
            {
                "patientId": patient["id"],
                "contactValue": value,
                "channel": channel,
                "purpose": "care",
                "basis": "WRITTEN",
                "textVersion": "2026-1",
                "evidence": "form 4711",
            },
        )
        assert consent["status"] == "ACTIVE"
    return patient


async def referred(coordinator: User, ids: dict[str, Any], patient: dict[str, Any]) -> dict[str, Any]:
    """2. A referral to a specialty is submitted and accepted by its pool; each open state has owner and due time."""
    referral = await coordinator.post(
        "/v1/referrals",
        {"patientId": patient["id"], "specialty": CARDIOLOGY, "priority": "URGENT", "clinicId": ids["east"]},
    )
    assert referral["businessStatus"] == "DRAFT" and referral["status"] == "DRAFT"
    open_states = [referral]
    referral = await coordinator.post(f"/v1/referrals/{referral['id']}:submit")
    assert referral["owner"] == {"type": "Pool", "id": referral["poolId"]}
    open_states.append(referral)
    referral = await coordinator.post(f"/v1/referrals/{referral['id']}:accept")
    assert referral["businessStatus"] == "ACCEPTED" and referral["status"] == "ACTIVE"
    open_states.append(referral)
    for state in open_states:
        assert state["owner"]["id"] and state["dueTime"] and state["dueBasis"]
    return referral


async def slots(coordinator: User, ids: dict[str, Any], start: datetime, **more: Any) -> list[dict[str, Any]]:
    answer = await coordinator.post(
        "/v1/availability:search",
        {
            "visitTypeId": ids["visit_type"],
            "clinicIds": [ids["east"], ids["west"]],
            "startTime": start.isoformat().replace("+00:00", "Z"),
            **more,
        },
    )
    return list(answer["slots"])


async def booked(
    world: World, coordinator: User, ids: dict[str, Any], patient: dict[str, Any], referral: dict[str, Any]
) -> dict[str, Any]:
    """3. The first free slot of two clinics is held, then booked; events bring referral, reminders and confirmation."""
    free = await slots(coordinator, ids, datetime.now(UTC) + timedelta(days=5), patientId=patient["id"])
    assert {one["clinicId"] for one in free} == {ids["east"], ids["west"]}
    assert {one["timeZone"] for one in free} == {"America/New_York", "America/Denver"}
    assert [one["startTime"] for one in free] == sorted(one["startTime"] for one in free)
    before = len(await letters_to(world, "2368"))
    held = await coordinator.post(
        "/v1/appointments:hold", {"patientId": patient["id"], "offerToken": free[0]["offerToken"]}
    )
    assert held["status"] == "PENDING" and held["holdExpireTime"]
    appointment = await coordinator.post(
        f"/v1/appointments/{held['id']}:book", {"basedOn": [{"type": "Referral", "id": referral["id"]}]}
    )
    assert appointment["status"] == "BOOKED"
    with pytest.raises(Refused) as taken:
        await coordinator.post(
            "/v1/appointments",
            {
                "patientId": patient["id"],
                "visitTypeId": ids["visit_type"],
                "clinicId": appointment["clinicId"],
                "practitionerId": appointment["practitionerId"],
                "startTime": appointment["startTime"],
            },
        )
    assert taken.value.status == 409
    scheduled = await until(
        lambda: coordinator.get(f"/v1/referrals/{referral['id']}"), lambda one: one["businessStatus"] == "SCHEDULED"
    )
    assert scheduled["appointmentId"] == appointment["id"] and scheduled["dueTime"]
    reminders = await until(
        lambda: coordinator.get("/v1/reminders", appointmentId=appointment["id"]),
        lambda answer: len(answer.get("reminders", [])) == 3 and _sent(answer["reminders"]),
    )
    assert len({one["offset"] for one in reminders["reminders"]}) == 3
    message = await until(
        lambda: coordinator.get("/v1/messages", patientIds=patient["id"]),
        lambda answer: about(answer.get("messages", []), appointment["id"], "COMPLETED"),
    )
    (confirmation,) = about(message["messages"], appointment["id"], "COMPLETED")
    assert confirmation["language"].startswith("es")
    assert confirmation["consentId"] and confirmation["localTime"]
    assert len(await letters_to(world, "2368")) == before + 1
    timeline = await until(
        lambda: coordinator.get(f"/v1/patients/{patient['id']}/timeline"),
        lambda answer: {"appointment.booked", "message.sent"} <= {one["type"] for one in answer["entries"]},
    )
    assert all(one["patientId"] == patient["id"] for one in timeline["entries"])
    return appointment


def _sent(reminders: list[dict[str, Any]]) -> bool:
    return any(one["status"] == "COMPLETED" for one in reminders)


def about(messages: list[dict[str, Any]], source: str, status: str) -> list[dict[str, Any]]:
    return [one for one in messages if one["about"]["id"] == source and one["status"] == status]


async def letters_to(world: World, number: str) -> list[Any]:
    return [one for one in await mailbox(world) if number in str(one)]


async def mailbox(world: World) -> list[Any]:
    async with httpx2.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"{world.system.url}/dev/mailbox", headers={"accept": "application/json"})
    body = answer.json()
    return list(body["messages"] if isinstance(body, dict) else body)


async def moved_and_confirmed(
    world: World, coordinator: User, ids: dict[str, Any], appointment: dict[str, Any], referral: dict[str, Any]
) -> dict[str, Any]:
    """4. Confirming re-plans nothing, rescheduling does; a cancelled visit's reminders are revoked."""
    version = int(appointment["scheduleVersion"])
    confirmed = await coordinator.post(f"/v1/appointments/{appointment['id']}:confirm")
    assert int(confirmed["scheduleVersion"]) == version and confirmed["confirmTime"]
    now = datetime.now(UTC)
    zone = ZoneInfo("America/New_York")
    # Soon, and still today where the clinic is, so that the patient may arrive.
    today = [
        one
        for one in await slots(coordinator, ids, now, clinicIds=[ids["east"]], patientId=appointment["patientId"])
        if datetime.fromisoformat(one["startTime"]).astimezone(zone).date() == now.astimezone(zone).date()
    ]
    if not today:
        pytest.skip("in the last minutes of the clinic's day nothing is free")
    moved = await coordinator.post(
        f"/v1/appointments/{appointment['id']}:reschedule", {"offerToken": today[0]["offerToken"]}
    )
    assert moved["id"] == appointment["id"] and int(moved["scheduleVersion"]) == version + 1
    plan = await until(
        lambda: coordinator.get("/v1/reminders", appointmentId=appointment["id"]),
        lambda answer: any(int(one["scheduleVersion"]) == version + 1 for one in answer["reminders"]),
    )
    old = [one for one in plan["reminders"] if int(one["scheduleVersion"]) == version]
    assert {one["status"] for one in old} <= {"REVOKED", "COMPLETED"}
    assert len([one for one in old if one["status"] == "REVOKED"]) == 2
    new = [one for one in plan["reminders"] if int(one["scheduleVersion"]) == version + 1]
    assert len(new) == 1, "3 days and 1 day before are past for a visit today"
    await cancelled(world, coordinator, ids)
    return moved


async def cancelled(world: World, coordinator: User, ids: dict[str, Any]) -> None:
    patient = await coordinator.post(
        f"/v1/patients?clinicId={ids['west']}&confirmNew=true",
        {"names": [{"familyName": "Wexcombe", "givenNames": ["Tarn"]}], "birthDate": "1961-04-05"},
    )
    free = await slots(coordinator, ids, datetime.now(UTC) + timedelta(days=6), clinicIds=[ids["west"]])
    visit = await coordinator.post(
        "/v1/appointments", {"patientId": patient["id"], "offerToken": free[0]["offerToken"]}
    )
    await until(
        lambda: coordinator.get("/v1/reminders", appointmentId=visit["id"]),
        lambda answer: len(answer.get("reminders", [])) == 3,
    )
    gone = await coordinator.post(f"/v1/appointments/{visit['id']}:cancel", {"reason": {"code": "pat"}})
    assert gone["status"] == "CANCELLED" and gone["cancelationReason"]["code"] == "pat"
    await until(
        lambda: coordinator.get("/v1/reminders", appointmentId=visit["id"]),
        lambda answer: not [one for one in answer["reminders"] if one["status"] == "ACTIVE"],
    )
    # Nobody agreed to be written to, so nothing left for this patient.
    messages = await coordinator.get("/v1/messages", patientIds=patient["id"])
    assert not [one for one in messages.get("messages", []) if one["status"] == "COMPLETED"]
    with pytest.raises(Refused) as twice:
        await coordinator.post(f"/v1/appointments/{visit['id']}:cancel", {"reason": {"code": "pat"}})
    assert twice.value.status == 409 and twice.value.reason == "ILLEGAL_TRANSITION"


async def seen(coordinator: User, appointment: dict[str, Any], referral: dict[str, Any]) -> None:
    """5. Arrived, taken back, arrived, checked in, fulfilled; the referral waits for its report."""
    path = f"/v1/appointments/{appointment['id']}"
    assert (await coordinator.post(f"{path}:arrive"))["status"] == "ARRIVED"
    assert (await coordinator.post(f"{path}:revert"))["status"] == "BOOKED"
    assert (await coordinator.post(f"{path}:arrive"))["status"] == "ARRIVED"
    assert (await coordinator.post(f"{path}:checkIn"))["status"] == "CHECKED_IN"
    fulfilled = await coordinator.post(f"{path}:fulfill")
    assert fulfilled["status"] == "FULFILLED"
    assert [one["action"] for one in fulfilled["history"]][-4:] == ["revert", "arrive", "check_in", "fulfill"]
    waiting = await until(
        lambda: coordinator.get(f"/v1/referrals/{referral['id']}"), lambda one: one["businessStatus"] == "SEEN"
    )
    assert waiting["owner"]["id"] and waiting["dueTime"]


async def surveyed(
    world: World, coordinator: User, ids: dict[str, Any], patient: dict[str, Any], appointment: dict[str, Any]
) -> None:
    """5. The link in the message answers the survey once, without a login; a critical answer is a task at once."""
    invited = await until(
        lambda: coordinator.get("/v1/surveyInvitations", patientIds=patient["id"]),
        lambda answer: [
            one
            for one in answer.get("invitations", [])
            if one["status"] == "INVITED" and one["appointmentId"] == appointment["id"]
        ],
    )
    (invitation,) = [one for one in invited["invitations"] if one["appointmentId"] == appointment["id"]]
    questionnaire = await coordinator.get(f"/v1/questionnaires/{invitation['questionnaireId']}")
    await until(
        lambda: coordinator.get("/v1/messages", patientIds=patient["id"]),
        lambda answer: about(answer["messages"], invitation["id"], "COMPLETED"),
    )
    text = str([one for one in await letters_to(world, "2368") if "/p/" in str(one)][-1])
    link = text[text.index("/p/") :].split()[0].split("\\")[0].rstrip("',\"}.")
    assert urlsplit(link).path == link
    async with httpx2.AsyncClient(base_url=world.system.url, trust_env=False) as stranger:
        for _ in range(2):
            page = await stranger.get(link)
            assert page.status_code == 200
            assert page.headers["referrer-policy"] == "no-referrer" and "no-store" in page.headers["cache-control"]
            assert "Zilda" not in page.text and "Beispiel" not in page.text
        form, critical = worst_answers(questionnaire)
        done = await stranger.post(link, data=form)
        assert done.status_code == 200
        assert critical and "988" in done.text
        again = await stranger.post(link, data=form)
        assert again.status_code == 200
        other = {**form, next(iter(form)): "1"}
        assert (await stranger.post(link, data=other)).status_code in (409, 410)
        assert (await stranger.get("/p/s-" + "A" * 22)).status_code == 404
    responses = await coordinator.get("/v1/questionnaireResponses", patientIds=patient["id"])
    ours = [one for one in responses["responses"] if one["invitationId"] == invitation["id"]]
    assert len(ours) == 1, responses
    worklist = await until(
        lambda: coordinator.get("/v1/tasks", patientId=patient["id"]),
        lambda answer: {"critical-answer", "low-score"} <= {one["code"] for one in answer.get("tasks", [])},
    )
    for task in worklist["tasks"]:
        assert task["owner"]["id"] and task["dueTime"] and task["dueBasis"]


def worst_answers(questionnaire: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """A form that answers each question as badly as can be, and whether that is critical."""
    form, critical = {}, False
    for item in questionnaire["items"]:
        if item["kind"] == "TEXT":
            continue
        values = sorted(option.get("value", 0) for option in item["options"])
        if "criticalFrom" in item:
            form[f"answer.{item['linkId']}.value"] = str(values[-1])
            critical = True
        else:
            form[f"answer.{item['linkId']}.value"] = str(values[0])
    return form, critical


async def closed(world: World, coordinator: User, ids: dict[str, Any], referral: dict[str, Any]) -> None:
    """5. The report comes, is read, the patient is told, the loop is closed."""
    path = f"/v1/referrals/{referral['id']}"
    received = await coordinator.post(
        f"{path}:recordReport", {"document": {"system": "urn:example:documents", "value": "doc-1"}, "source": "FAX"}
    )
    assert received["businessStatus"] == "REPORT_RECEIVED" and received["dueTime"]
    acknowledged = await coordinator.post(f"{path}:acknowledgeReport")
    assert acknowledged["businessStatus"] == "REPORT_ACKNOWLEDGED" and acknowledged["owner"]["id"]
    contact = await coordinator.post(
        "/v1/contacts",
        {
            "patientId": referral["patientId"],
            "channel": "VOICE",
            "direction": "OUTBOUND",
            "outcome": "REACHED",
            "minutes": 4,
            "referralId": referral["id"],
        },
    )
    informed = await coordinator.post(f"{path}:recordPatientInformed", {"channel": "VOICE", "contactId": contact["id"]})
    assert informed["businessStatus"] == "PATIENT_INFORMED"
    done = await coordinator.post(f"{path}:close", {"outcome": {"code": "treated"}})
    assert done["businessStatus"] == "CLOSED" and done["status"] == "COMPLETED"
    assert "dueTime" not in done


async def missed(coordinator: User, ids: dict[str, Any]) -> None:
    """5. A no-show puts its referral back and makes a task; an attempt to call is a contact of the task."""
    patient = await coordinator.get(f"/v1/patients/{(await found(coordinator, 'Beispiel2'))['id']}")
    referral = await referred(coordinator, ids, patient)
    practitioners = (await coordinator.get("/v1/practitioners", clinicIds=ids["west"]))["practitioners"]
    # A walk-in who was gone again: the start is a few minutes past.
    start = datetime.now(UTC) - timedelta(minutes=5)
    start = start.replace(minute=start.minute - start.minute % 5, second=0, microsecond=0)
    visit = await coordinator.post(
        "/v1/appointments",
        {
            "patientId": patient["id"],
            "visitTypeId": ids["visit_type"],
            "clinicId": ids["west"],
            "practitionerId": practitioners[0]["id"],
            "startTime": start.isoformat().replace("+00:00", "Z"),
            "basedOn": [{"type": "Referral", "id": referral["id"]}],
        },
    )
    await until(
        lambda: coordinator.get(f"/v1/referrals/{referral['id']}"), lambda one: one["businessStatus"] == "SCHEDULED"
    )
    assert (await coordinator.post(f"/v1/appointments/{visit['id']}:markNoShow"))["status"] == "NOSHOW"
    back = await until(
        lambda: coordinator.get(f"/v1/referrals/{referral['id']}"), lambda one: one["businessStatus"] == "UNATTENDED"
    )
    assert int(back["attempts"]) == 1 and back["dueTime"]
    worklist = await until(
        lambda: coordinator.get("/v1/tasks", patientId=patient["id"], codes="rebook-no-show"),
        lambda answer: answer.get("tasks"),
    )
    (task,) = worklist["tasks"]
    claimed = await coordinator.post(f"/v1/tasks/{task['id']}:claim")
    assert claimed["status"] == "IN_PROGRESS" and claimed["owner"] == {"type": "Staff", "id": ids["staff"]}
    contact = await coordinator.post(
        "/v1/contacts",
        {
            "patientId": patient["id"],
            "channel": "VOICE",
            "direction": "OUTBOUND",
            "outcome": "NO_ANSWER",
            "taskId": task["id"],
        },
    )
    contacts = await coordinator.get("/v1/contacts", patientId=patient["id"], taskId=task["id"])
    assert [one["id"] for one in contacts["contacts"]] == [contact["id"]]


async def summed_up(world: World, coordinator: User, patient: dict[str, Any]) -> None:
    """6. One call tells all; with one service stopped its section is absent and named."""
    path = f"/v1/patients/{patient['id']}/summary"
    whole = await coordinator.get(path)
    assert "degraded" not in whole
    assert whole["patient"]["id"] == patient["id"]
    assert whole["appointments"].get("past") or whole["appointments"].get("upcoming")
    assert "referrals" in whole and whole["messages"]["latest"] and whole["tasks"]["open"]
    assert whole["feedback"]["responses"]
    await world.system.stop_service("feedback")
    try:
        partial = await until(lambda: coordinator.get(path), lambda answer: answer.get("degraded"))
        assert partial["degraded"] == ["feedback"] and "feedback" not in partial
        assert partial["patient"]["id"] == patient["id"] and partial["tasks"]["open"]
    finally:
        await world.system.start_service("feedback")
    accesses = await world.user("privacy_officer").request("GET", f"/v1/patients/{patient['id']}/accesses")
    assert accesses.status_code in (200, 404)
