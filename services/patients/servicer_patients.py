"""Patients' records over gRPC."""

from datetime import timedelta

from care.patients.v1 import patients_pb2 as pb
from care.patients.v1.patients_pb2_grpc import PatientsServiceServicer
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import and_, func, or_, select
from sqlalchemy.dialects.postgresql import insert

from chassis.access import visible
from chassis.call import Call, require_etag
from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, NotFound, PermissionDenied
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, given, to_proto
from services.patients.consent import Consent, end_consents, recipient_of
from services.patients.due_times import due
from services.patients.names import digits, fold, phonetic
from services.patients.patient import Grant, Patient, PatientIdentifier, RelatedPerson, relate, tell_access
from services.patients.staff import Pool
from services.patients.task import Task, open_task

_READ_ONLY = OUTPUT_ONLY | {"clinic_ids", "survivor_id"}
_BREAK_GLASS_MINUTES = 60
_REVIEW_FOR = timedelta(days=30)


class PatientsServicer(PatientsServiceServicer):
    """Registry of patients."""

    async def CreatePatient(self, request: pb.CreatePatientRequest, call: Call) -> pb.Patient:
        _own_clinic(call, request.clinic_id)
        patient = Patient(id=new_id())
        patient.change(**_values(call, request.patient))
        hidden = await _like_existing(call, patient, refuse=not request.confirm_new)
        await call.add(patient)
        await call.db.flush()
        hidden += await _claim_identifiers(call, patient)
        await tell_access_of_new(call, patient, [request.clinic_id], "registered")
        if hidden:
            await _review_duplicate(call, patient, "one day after registration")
        call.saw(patient.id)
        await call.db.flush()
        return to_proto(patient, pb.Patient)

    async def GetPatient(self, request: pb.GetPatientRequest, call: Call) -> pb.Patient:
        return to_proto(await call.get(Patient, request.id), pb.Patient)

    async def ListPatients(self, request: pb.ListPatientsRequest, call: Call) -> pb.ListPatientsResponse:
        wanted = Rows(Patient).overlap(Patient.clinic_ids, request.clinic_ids)
        rows, following = await call.page(wanted, request, Patient.create_time, Patient.id, descending=True)
        return pb.ListPatientsResponse(patients=[to_proto(row, pb.Patient) for row in rows], next_page_token=following)

    async def UpdatePatient(self, request: pb.UpdatePatientRequest, call: Call) -> pb.Patient:
        patient = await call.get(Patient, request.patient.id, etag=require_etag(request.etag))
        values = _values(call, request.patient, request.update_mask)
        if patient.source_system and not call.allows("patients.import"):
            # How a patient is reached is asked at intake, whoever owns the rest of the record.
            if not values.keys() <= {"telecom", "languages", "interpreter_needed", "time_zone"}:
                raise FailedPrecondition(
                    "MANAGED_OUTSIDE",
                    "Another system owns this record; only telecom, languages, interpreter and zone change here.",
                )
        await _change(call, patient, values)
        await call.db.flush()
        return to_proto(patient, pb.Patient)

    async def UpsertPatient(self, request: pb.UpsertPatientRequest, call: Call) -> pb.UpsertPatientResponse:
        if not request.patient.identifiers:
            raise Invalid("IDENTIFIER_MISSING", "An upsert needs an identifier.", field="patient.identifiers")
        values = _values(call, request.patient)
        key = request.patient.identifiers[0]
        known = call.tenant_wide(PatientIdentifier).where(
            PatientIdentifier.system == key.system, PatientIdentifier.value == key.value
        )
        owner = (await call.db.execute(known)).scalar_one_or_none()
        if owner is None:
            patient = Patient(id=new_id())
            patient.change(**values)
            await call.add(patient)
            await call.db.flush()
            hidden = await _claim_identifiers(call, patient)
            await tell_access_of_new(call, patient, list(request.clinic_ids), "encounter")
            if hidden:
                await _review_duplicate(call, patient, "one day after registration")
            created = changed = True
        else:
            query = call.tenant_wide(Patient).where(Patient.id == owner.patient_id)
            patient = (await call.db.execute(query)).scalar_one()
            created = False
            changed = await _change(call, patient, _keeping_intake(patient, values))
            if await relate(call.db, patient, list(request.clinic_ids), "encounter"):
                await tell_access(call.db, patient)
                changed = True
        call.saw(patient.id)
        await call.db.flush()
        return pb.UpsertPatientResponse(patient=to_proto(patient, pb.Patient), created=created, changed=changed)

    async def SearchPatients(self, request: pb.SearchPatientsRequest, call: Call) -> pb.SearchPatientsResponse:
        where = []
        # What nothing is left of after folding, such as "-", would fit everybody: it is no criterion.
        if family := fold(request.family_name):
            alike = Patient.family_folded.startswith(family, autoescape=True)
            sound = phonetic(family)
            where.append(or_(alike, Patient.family_phonetic == sound) if sound else alike)
        if given_name := fold(request.given_name):
            where.append(Patient.given_folded.startswith(given_name, autoescape=True))
        if request.birth_date:
            where.append(Patient.birth_date == request.birth_date)
        if phone_digits := digits(request.phone):
            where.append(Patient.phone_digits.contains([phone_digits]))
        if request.HasField("identifier"):
            where.append(
                select(PatientIdentifier.id)
                .where(
                    PatientIdentifier.tenant_id == Patient.tenant_id,
                    PatientIdentifier.patient_id == Patient.id,
                    PatientIdentifier.system == request.identifier.system,
                    PatientIdentifier.value == request.identifier.value,
                )
                .exists()
            )
        if len(where) + request.HasField("identifier") < 2:
            raise Invalid("TWO_CRITERIA_NEEDED", "Give two criteria, or an identifier with its system.")
        size = min(max(request.page_size or 20, 1), 50)
        found = (
            await call.db.execute(
                call.tenant_wide(Patient)
                .where(*where, Patient.restricted.is_(False), Patient.active)
                .order_by(Patient.family_folded, Patient.given_folded, Patient.id)
                .limit(size)
            )
        ).scalars()
        answer = pb.SearchPatientsResponse()
        patients = list(found)
        readable = await _readable(call, [patient.id for patient in patients])
        for patient in patients:
            call.saw(patient.id)
            phone = next((one["value"] for one in patient.telecom if one.get("system") == "PHONE"), "")
            card = answer.matches.add(
                id=patient.id,
                birth_date=patient.birth_date,
                gender=patient.gender,
                city=(patient.addresses[0].get("city", "") if patient.addresses else ""),
                phone_last_four=digits(phone)[-4:],
                readable=patient.id in readable,
            )
            if patient.names:
                card.name.CopyFrom(to_proto(patient, pb.Patient).names[0])
        return answer

    async def OpenPatient(self, request: pb.OpenPatientRequest, call: Call) -> pb.Patient:
        _own_clinic(call, request.clinic_id)
        query = call.tenant_wide(Patient).where(Patient.id == request.id, Patient.restricted.is_(False))
        patient = (await call.db.execute(query)).scalar_one_or_none()
        if patient is None:
            raise NotFound
        call.saw(patient.id)
        call.purpose = request.reason
        if await relate(call.db, patient, [request.clinic_id], "opened"):
            await tell_access(call.db, patient)
        await call.db.flush()
        return to_proto(patient, pb.Patient)

    async def BreakGlass(self, request: pb.BreakGlassRequest, call: Call) -> pb.BreakGlassResponse:
        if call.caller.kind != "staff":
            raise PermissionDenied("STAFF_ONLY", "Only staff can break the glass.")
        patient = (
            await call.db.execute(call.tenant_wide(Patient).where(Patient.id == request.id))
        ).scalar_one_or_none()
        if patient is None:
            raise NotFound
        call.saw(patient.id)
        call.purpose = request.reason
        expires = call.now + timedelta(minutes=request.minutes or _BREAK_GLASS_MINUTES)
        broken = Grant(
            tenant_id=call.tenant_id,
            id=new_id(),
            patient_id=patient.id,
            staff_id=call.caller.id,
            reason=request.reason,
            expire_time=expires,
        )
        call.db.add(broken)
        task = await open_task(
            call.db,
            tenant_id=call.tenant_id,
            patient_id=patient.id,
            code="review-break-glass",
            source=("Staff", call.caller.id),
            episode=broken.id,
            purpose="privacy",
            due_time=call.now + timedelta(days=1),
            due_basis="one day after the glass was broken",
            priority="URGENT",
            note=request.reason,
        )
        await _let_review(call, patient, task)
        return to_proto({"patient_id": patient.id, "expire_time": expires}, pb.BreakGlassResponse)

    async def CreateRelatedPerson(self, request: pb.CreateRelatedPersonRequest, call: Call) -> pb.RelatedPerson:
        values = given(request.related_person, read_only=OUTPUT_ONLY | {"security_labels"})
        patient = await call.get(Patient, values.pop("patient_id"))
        person = RelatedPerson(id=new_id(), patient_id=patient.id)
        person.change(**values)
        await call.add(person)
        await call.db.flush()
        if person.proxy_permissions:
            await tell_access(call.db, patient)
        return to_proto(person, pb.RelatedPerson)

    async def ListRelatedPersons(
        self, request: pb.ListRelatedPersonsRequest, call: Call
    ) -> pb.ListRelatedPersonsResponse:
        await call.subject(request.patient_id)
        wanted = Rows(RelatedPerson).equal(RelatedPerson.patient_id, request.patient_id)
        rows, following = await call.page(wanted, request, RelatedPerson.create_time, RelatedPerson.id)
        return pb.ListRelatedPersonsResponse(
            related_persons=[to_proto(row, pb.RelatedPerson) for row in rows], next_page_token=following
        )

    async def BatchGetRecipients(
        self, request: pb.BatchGetRecipientsRequest, call: Call
    ) -> pb.BatchGetRecipientsResponse:
        ids = sorted({item.patient_id for item in request.items})
        related = sorted({item.recipient.id for item in request.items if item.recipient.type == "RelatedPerson"})
        patients = {row.id: row for row in await call.all(Rows(Patient).among(Patient.id, ids))}
        persons = (
            {row.id: row for row in await call.all(Rows(RelatedPerson).among(RelatedPerson.id, related))}
            if related
            else {}
        )
        consents = await call.all(Rows(Consent).among(Consent.patient_id, ids).equal(Consent.status, "ACTIVE"))
        call.saw(*ids)
        answer = pb.BatchGetRecipientsResponse()
        for item in request.items:
            answer.recipients.append(
                to_proto(
                    recipient_of(
                        patients.get(item.patient_id),
                        persons.get(item.recipient.id),
                        kind=item.recipient.type,
                        channel=_channel(item.channel),
                        purpose=item.purpose,
                        consents=consents,
                    ),
                    pb.BatchGetRecipientsResponse.Recipient,
                )
            )
        return answer


def _channel(number: int) -> str:
    from care.type.v1 import type_pb2

    return type_pb2.Channel.Code.Name(number)


def _values(call: Call, patient: pb.Patient, mask: FieldMask | None = None) -> dict:
    """What a request sets. Only who imports names the owning system: anybody else's word would lock the record."""
    read_only = _READ_ONLY if call.allows("patients.import") else _READ_ONLY | {"source_system"}
    values = given(patient, mask, read_only=read_only)
    # Wherever the patient is, no day has begun anywhere that is 14 hours ahead of UTC's.
    today = (call.now + timedelta(hours=14)).date().isoformat()
    for name in ("birth_date", "deceased_date"):
        # Also of a year or a month alone: the text's order is the calendar's.
        if values.get(name, "") > today:
            raise Invalid("DATE_IN_FUTURE", "This day has not come yet.", field=f"patient.{name}")
    return values


def _own_clinic(call: Call, clinic_id: str) -> None:
    if clinic_id not in call.caller.group_ids:
        raise PermissionDenied("NOT_OWN_CLINIC", "You don't belong to this clinic.")


def _keeping_intake(patient: Patient, values: dict) -> dict:
    """An import brings its own telecom; what was added at intake stays behind it."""
    if "telecom" in values:
        brought = {one["value"] for one in values["telecom"]}
        kept = [one for one in patient.telecom if one["value"] not in brought]
        values["telecom"] = [*values["telecom"], *kept]
    if patient.time_zone_source == "STATED":
        values.pop("time_zone", None)
        values.pop("time_zone_source", None)
    return values


async def _change(call: Call, patient: Patient, values: dict) -> bool:
    """Change a record; ends consents for contact values that are gone. Answers whether anything changed."""
    before = {name: getattr(patient, name) for name in values}
    was_labels = patient.record_labels
    gone = patient.change(**values)
    if all(getattr(patient, name) == value for name, value in before.items()):
        return False
    if "identifiers" in values and await _claim_identifiers(call, patient):
        await _review_duplicate(call, patient, "one day after the change")
    if gone:
        await end_consents(call.db, patient, gone)
    if patient.deceased and not before.get("deceased", True):
        await _review_deceased(call, patient)
    patient.tell("updated")
    if patient.record_labels != was_labels:
        await tell_access(call.db, patient)
    return True


async def _review_deceased(call: Call, patient: Patient) -> None:
    """Somebody looks after what is open: equipment, family, referrals."""
    clinic = patient.clinic_ids[0] if patient.clinic_ids else None
    until = await due(call.db, call.tenant_id, "deceased-review", clinic, call.now)
    await open_task(
        call.db,
        tenant_id=call.tenant_id,
        patient_id=patient.id,
        code="deceased-review",
        source=("Patient", patient.id),
        # Marked by mistake, corrected and marked again is another episode.
        episode=str(patient.version),
        purpose="coordination",
        due_time=until.time,
        due_basis=until.basis,
        clinic_id=clinic,
        labels=patient.security_labels,
    )


async def _review_duplicate(call: Call, patient: Patient, basis: str) -> None:
    """The privacy officers look at a record that is like a restricted one: its writer isn't told."""
    task = await open_task(
        call.db,
        tenant_id=call.tenant_id,
        patient_id=patient.id,
        code="review-duplicate",
        source=("Patient", patient.id),
        purpose="privacy",
        due_time=call.now + timedelta(days=1),
        due_basis=basis,
    )
    await _let_review(call, patient, task)


async def _let_review(call: Call, patient: Patient, task: Task | None) -> None:
    """Give the members of a review's pool what they need for it, and tell the access set.

    They have no relation to the patient: without a grant of their own the review would be out of their sight.
    """
    pool = await call.get(Pool, task.owner_id) if task is not None else None
    for staff_id in pool.staff_ids if pool is not None else ():
        call.db.add(
            Grant(
                tenant_id=call.tenant_id,
                id=new_id(),
                patient_id=patient.id,
                staff_id=staff_id,
                reason="review",
                permissions=["tasks.read", "tasks.write", "accesses.read"],
                expire_time=call.now + _REVIEW_FOR,
            )
        )
    await tell_access(call.db, patient)


async def tell_access_of_new(call: Call, patient: Patient, clinic_ids: list[str], reason: str) -> None:
    """A new record: its first access set, then its relations, which refer to it."""
    await tell_access(call.db, patient)
    patient.__dict__.pop("_told", None)  # one access set is told, the whole one
    await relate(call.db, patient, clinic_ids, reason)
    await tell_access(call.db, patient)
    patient.tell("registered")


async def _claim_identifiers(call: Call, patient: Patient) -> list[str]:
    """Make the record's claims under the unique key those of its list; answers the restricted records that hold one.

    Raises AlreadyExists `IDENTIFIER_TAKEN` where a record that isn't restricted holds it.
    """
    hidden = []
    wanted = {(one["system"], one["value"]) for one in patient.identifiers or ()}
    claims = await call.db.execute(
        select(PatientIdentifier).where(
            PatientIdentifier.tenant_id == call.tenant_id, PatientIdentifier.patient_id == patient.id
        )
    )
    for claim in claims.scalars():
        if (claim.system, claim.value) not in wanted:
            await call.db.delete(claim)
    for one in patient.identifiers or ():
        claim = (
            insert(PatientIdentifier)
            .values(
                tenant_id=call.tenant_id,
                id=new_id(),
                patient_id=patient.id,
                system=one["system"],
                value=one["value"],
            )
            .on_conflict_do_nothing(constraint="patient_identifier_key")
            .returning(PatientIdentifier.id)
        )
        if (await call.db.execute(claim)).first() is not None:
            continue
        owner = (
            await call.db.execute(
                select(Patient.id, Patient.restricted)
                .join(
                    PatientIdentifier,
                    and_(PatientIdentifier.tenant_id == Patient.tenant_id, PatientIdentifier.patient_id == Patient.id),
                )
                .where(
                    PatientIdentifier.tenant_id == call.tenant_id,
                    PatientIdentifier.system == one["system"],
                    PatientIdentifier.value == one["value"],
                )
            )
        ).one()
        if owner.id == patient.id:
            continue
        if not owner.restricted:
            raise AlreadyExists("IDENTIFIER_TAKEN", "An identifier belongs to another record.")
        # To say "taken" would tell that a restricted record exists.
        hidden.append(owner.id)
    return hidden


async def _like_existing(call: Call, patient: Patient, *, refuse: bool) -> list[str]:
    """Restricted records that are like a new one. Raises AlreadyExists `POSSIBLE_DUPLICATE` for others if `refuse`."""
    if not patient.birth_date or not patient.family_folded:
        return []
    alike = (
        await call.db.execute(
            select(Patient.id, Patient.restricted)
            .where(
                Patient.tenant_id == call.tenant_id,
                Patient.birth_date == patient.birth_date,
                or_(
                    Patient.family_folded == patient.family_folded,
                    Patient.family_phonetic == patient.family_phonetic,
                ),
                func.left(Patient.given_folded, 3) == patient.given_folded[:3],
                Patient.active,
            )
            .limit(10)
        )
    ).all()
    open_ones = [one.id for one in alike if not one.restricted]
    if open_ones and refuse:
        shown = {"ids": ",".join(open_ones)} if call.allows("patients.match") else {}
        raise AlreadyExists(
            "POSSIBLE_DUPLICATE", "A like patient exists; look it up, or confirm with confirm_new.", **shown
        )
    return [one.id for one in alike if one.restricted]


async def _readable(call: Call, ids: list[str]) -> set[str]:
    table = call.runtime.access.tables.subject
    conditions = call.runtime.access.conditions(call.caller, "patients.read", ids)
    rows = await call.db.execute(
        select(table.c.patient_id).where(
            table.c.tenant_id == call.tenant_id, table.c.patient_id.in_(ids), visible(None, conditions)
        )
    )
    return {row.patient_id for row in rows}
