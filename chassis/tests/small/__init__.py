"""A small service over some of the contract's RPCs, for the tests of everything that services get from the chassis."""

import asyncio
import contextlib
import enum
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from care.access.v1 import access_pb2
from care.feedback.v1 import feedback_pb2
from care.patients.v1 import (
    consents_pb2,
    consents_pb2_grpc,
    events_pb2,
    staff_pb2,
    staff_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
)
from google.protobuf.message import Message
from sqlalchemy import CheckConstraint, UniqueConstraint, event, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import Text

from chassis.call import Call, require_etag
from chassis.errors import AlreadyExists, NotFound, Unavailable
from chassis.ids import new_id
from chassis.lifecycle import Lifecycle
from chassis.model import Aggregate, Id, Ids, Living, about_subject, base, status_type
from chassis.reading import Rows
from chassis.service import Server, Service
from chassis.testing.harness import Harness
from chassis.timers import Loop
from chassis.wire import OUTPUT_ONLY, enum_names, given, to_proto

Hook = Callable[[Message, Call], Awaitable[None]]
ALL = [
    "pools.read", "pools.write", "consents.read", "consents.write", "tasks.read", "tasks.write", "tasks.assign",
    "accesses.read",
]  # fmt: skip
_STUBS: dict[str, tuple[Any, Any]] = {
    "Pool": (staff_pb2_grpc.PoolsServiceStub, staff_pb2),
    "Consent": (consents_pb2_grpc.ConsentsServiceStub, consents_pb2),
    "Task": (tasks_pb2_grpc.TasksServiceStub, tasks_pb2),
}


class ConsentStatus(enum.Enum):
    """FHIR consent-state-codes, as far as they are needed here."""

    ACTIVE = "active"
    INACTIVE = "inactive"


class TaskStatus(enum.Enum):
    """FHIR task-status, as far as it is needed here."""

    READY = "ready"
    IN_PROGRESS = "in-progress"
    COMPLETED = "completed"


def models() -> SimpleNamespace:
    """Classes on a base of their own: directory data, and two kinds of rows about a patient."""
    Base = base()

    class Pool(Aggregate, Base):  # type: ignore[misc, valid-type]
        __tablename__ = "pool"
        __table_args__ = (
            UniqueConstraint("tenant_id", "name", name="pool_name_key"),
            UniqueConstraint("tenant_id", "purpose", "name", name="pool_undeclared_key"),
            CheckConstraint("name <> 'Forbidden'", name="name"),
        )
        aggregate = "pool"
        subject_field = None
        name: Mapped[str]
        purpose: Mapped[str] = mapped_column(default="")
        staff_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
        clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
        specialty_codes: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
        active: Mapped[bool] = mapped_column(default=True)

    class Consent(Living, Base):  # type: ignore[misc, valid-type]
        __tablename__ = "consent"
        __table_args__ = (about_subject("consent"),)
        aggregate = "consent"
        lifecycle = Lifecycle(
            ("record", [], ConsentStatus.ACTIVE, "created"),
            ("revoke", [ConsentStatus.ACTIVE], ConsentStatus.INACTIVE, "revoked"),
            ("touch", [ConsentStatus.ACTIVE], ConsentStatus.ACTIVE, None),
        )
        patient_id: Mapped[str] = mapped_column(Id)
        contact_value: Mapped[str]
        channel: Mapped[str]
        purpose: Mapped[str]
        basis: Mapped[str]
        text_version: Mapped[str]
        evidence: Mapped[str]
        status: Mapped[ConsentStatus] = mapped_column(status_type(ConsentStatus))

    class Task(Living, Base):  # type: ignore[misc, valid-type]
        __tablename__ = "task"
        __table_args__ = (about_subject("task"),)
        aggregate = "task"
        lifecycle = Lifecycle(
            ("create", [], TaskStatus.READY, "created"),
            ("claim", [TaskStatus.READY], TaskStatus.IN_PROGRESS, "claimed"),
            ("complete", [TaskStatus.IN_PROGRESS], TaskStatus.COMPLETED, "completed"),
            ("release", [TaskStatus.IN_PROGRESS, TaskStatus.COMPLETED], None, "released"),
        )
        patient_id: Mapped[str] = mapped_column(Id)
        code: Mapped[str]
        due_time: Mapped[datetime]
        note: Mapped[str] = mapped_column(default="")
        done: Mapped[int] = mapped_column(default=0)
        status: Mapped[TaskStatus] = mapped_column(status_type(TaskStatus))

    return SimpleNamespace(Base=Base, Pool=Pool, Consent=Consent, Task=Task)


class KnownToAll:
    """The owner of access as a fake: what it knows, how often it was asked, and whether it is away."""

    def __init__(self) -> None:
        self.known: dict[str, access_pb2.SubjectAccess] = {}
        self.logins: dict[str, access_pb2.ResolvePrincipalResponse] = {}
        self.away = False
        self.asked: list[str] = []

    async def subjects(self, tenant_id: str, subject_ids: Sequence[str]) -> Sequence[access_pb2.SubjectAccess]:
        self.asked += subject_ids
        if self.away:
            raise Unavailable("SERVICE_UNAVAILABLE", "A service that is needed does not answer; try again.")
        found = [self.known[one] for one in subject_ids if one in self.known]
        return [one for one in found if one.tenant_id == tenant_id]

    async def principal(self, tenant_id: str, issuer: str, subject: str) -> access_pb2.ResolvePrincipalResponse:
        self.asked.append(subject)
        if self.away:
            raise Unavailable("SERVICE_UNAVAILABLE", "A service that is needed does not answer; try again.")
        return self.logins.get(subject, access_pb2.ResolvePrincipalResponse())


class Small:
    """The service, the harness that runs it, and hooks: awaited by an RPC's name when its work is done, before the commit."""

    def __init__(
        self, harness: Harness, *, name: str = "referrals", loops: Sequence[Loop] = (), owns_access: bool = False
    ) -> None:
        self.harness = harness
        self.name = name
        self.models = models()
        self.hooks: dict[str, Hook] = {}
        self.service = self._service(loops, owns_access)
        self.owner = KnownToAll()
        self.clinic = new_id()
        self.ada = ""

    def _service(self, loops: Sequence[Loop], owns_access: bool) -> Service:
        ends = _servicers(self.models, self.hooks)
        return Service(
            name=self.name,
            base=self.models.Base,
            migrations=Path(__file__).parent / "migrations",
            owns_access=owns_access,
            servicers={
                staff_pb2.DESCRIPTOR.services_by_name["PoolsService"]: ends.Pools(),
                consents_pb2.DESCRIPTOR.services_by_name["ConsentsService"]: ends.Consents(),
                tasks_pb2.DESCRIPTOR.services_by_name["TasksService"]: ends.Tasks(),
                access_pb2.DESCRIPTOR.services_by_name["AccessService"]: ends.Access(),
                feedback_pb2.DESCRIPTOR.services_by_name["SurveyLinksService"]: ends.Links(),
            },
            payloads={
                "pool": events_pb2.PoolState,
                "consent": events_pb2.ConsentEvent,
                "task": events_pb2.TaskEvent,
            },
            loops=loops,
            reasons={"pool_name_key": (AlreadyExists, "NAME_TAKEN", "A pool of this name exists.")},
        )

    async def open(self, **settings: Any) -> "Small":
        """Start it; ada may do everything at `clinic`."""
        await self.harness.start(self.service, **settings)
        if not self.service.owns_access:
            self.server.access._owner = self.owner
        self.ada = await self.harness.staff("ada", ALL, clinics=[self.clinic])
        return self

    @property
    def server(self) -> Server:
        return self.harness.servers[self.name]

    async def rpc(self, method: str, who: str = "ada", **fields: Any) -> Any:
        """One call. Raises Problem."""
        stub, module = next(known for word, known in _STUBS.items() if word in method)
        return await self.harness.call(self.name, stub, method, getattr(module, f"{method}Request")(**fields), who)

    async def sql(self, query: str, **values: Any) -> Any:
        """Rows of a statement that stands by itself."""
        engine = self.server.database.engine.execution_options(isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            found = await connection.execute(text(query), values)
            return found.all() if found.returns_rows else []

    async def pool(self, name: str = "", **more: Any) -> Any:
        """A pool; any name will do."""
        return await self.rpc("CreatePool", pool={"name": name or f"pool {new_id()}"}, **more)

    async def patient(self, *grantees: str, **more: Any) -> str:
        """A patient of the clinic."""
        return await self.harness.subject(*(grantees or (self.clinic,)), **more)

    async def consent(self, patient_id: str, who: str = "ada", **more: Any) -> Any:
        """A consent of a patient."""
        wanted = {
            "patient_id": patient_id,
            "contact_value": "+17205348110",
            "channel": "SMS",
            "purpose": "care",
            "basis": "EXPRESS",
            "text_version": "1",
            "evidence": "form 7",
        }
        return await self.rpc("CreateConsent", who, consent=wanted, **more)

    async def task(self, patient_id: str, *, due: timedelta = timedelta(hours=1), who: str = "ada", **more: Any) -> Any:
        """A task about a patient."""
        (now,) = (await self.sql("SELECT clock_timestamp()"))[0]
        wanted = {"patient_id": patient_id, "code": "call-patient", "due_time": now + due, **more}
        return await self.rpc("CreateTask", who, task=wanted)

    @contextlib.contextmanager
    def statements(self) -> Iterator[list[str]]:
        """What calls sent to the database meanwhile: BEGIN, COMMIT, ROLLBACK, and the first words of statements."""
        seen: list[str] = []
        engine = self.server.database.engine.sync_engine

        def note(statement: str) -> None:
            task = asyncio.current_task()
            # Not the service's own work: relay, sealer, loops. The name is grpc's own for what serves a call.
            if task is not None and task.get_name().startswith("HandleExceptions"):
                seen.append(" ".join(statement.split())[:60])

        def ran(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            note(statement)

        def noted(word: str) -> Callable[..., None]:
            def listener(connection: Any, *_: Any) -> None:
                if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
                    note(word)

            return listener

        loader: Any = self.server.database._loader
        fetch = loader.fetch

        async def fetched(sql: str, arguments: Sequence[Any]) -> list[Any]:
            note(sql)
            found: list[Any] = await fetch(sql, arguments)
            return found

        listeners: list[tuple[str, Any]] = [
            ("before_cursor_execute", ran),
            ("begin", noted("BEGIN")),
            ("commit", noted("COMMIT")),
            ("rollback", noted("ROLLBACK")),
        ]
        for name, function in listeners:
            event.listen(engine, name, function)
        loader.fetch = fetched
        try:
            yield seen
        finally:
            del loader.fetch
            for name, function in listeners:
                event.remove(engine, name, function)


def _servicers(model: SimpleNamespace, hooks: dict[str, Hook]) -> SimpleNamespace:
    async def end(request: Message, call: Call) -> None:
        if call.method.writes:
            await call.db.flush()
        if hook := hooks.get(call.method.descriptor.name):
            await hook(request, call)

    class Pools:
        async def CreatePool(self, request: Any, call: Call) -> Any:
            pool = await call.add(model.Pool(id=new_id(), **given(request.pool)))
            pool.tell("changed")
            await end(request, call)
            return to_proto(pool, staff_pb2.Pool)

        async def GetPool(self, request: Any, call: Call) -> Any:
            pool = await call.get(model.Pool, request.id)
            await end(request, call)
            return to_proto(pool, staff_pb2.Pool)

        async def ListPools(self, request: Any, call: Call) -> Any:
            rows, following = await call.page(Rows(model.Pool), request, model.Pool.name, model.Pool.id)
            await end(request, call)
            return staff_pb2.ListPoolsResponse(
                pools=[to_proto(row, staff_pb2.Pool) for row in rows], next_page_token=following
            )

        async def UpdatePool(self, request: Any, call: Call) -> Any:
            pool = await call.get(model.Pool, request.pool.id, etag=require_etag(request.etag))
            for name, value in given(request.pool, request.update_mask).items():
                setattr(pool, name, value)
            pool.tell("changed")
            await end(request, call)
            return to_proto(pool, staff_pb2.Pool)

    class Consents:
        async def CreateConsent(self, request: Any, call: Call) -> Any:
            values = given(request.consent, read_only=OUTPUT_ONLY | {"recipient"})
            consent = model.Consent(id=new_id(), **values)
            consent.move("record")
            await call.add(consent)
            await end(request, call)
            return to_proto(consent, consents_pb2.Consent)

        async def GetConsent(self, request: Any, call: Call) -> Any:
            consent = await call.get(model.Consent, request.id)
            await end(request, call)
            return to_proto(consent, consents_pb2.Consent)

        async def ListConsents(self, request: Any, call: Call) -> Any:
            wanted = (
                Rows(model.Consent)
                .equal(model.Consent.patient_id, request.patient_id)
                .among(model.Consent.status, enum_names(consents_pb2.Consent.Status, request.statuses))
            )
            rows, following = await call.page(
                wanted, request, model.Consent.create_time, model.Consent.id, descending=True
            )
            await end(request, call)
            return consents_pb2.ListConsentsResponse(
                consents=[to_proto(row, consents_pb2.Consent) for row in rows], next_page_token=following
            )

        async def RevokeConsent(self, request: Any, call: Call) -> Any:
            consent = await call.get(model.Consent, request.id)
            consent.move("revoke", reason_code="revoked")
            await end(request, call)
            return to_proto(consent, consents_pb2.Consent)

    class Tasks:
        async def CreateTask(self, request: Any, call: Call) -> Any:
            values = given(request.task, read_only=OUTPUT_ONLY | {"priority", "clinic_id", "reason_code"})
            task = model.Task(id=new_id(), **values)
            task.security_labels = [request.task.reason_code] if request.task.reason_code else []
            task.move("create")
            await call.add(task)
            await end(request, call)
            return to_proto(task, tasks_pb2.Task)

        async def GetTask(self, request: Any, call: Call) -> Any:
            task = await call.get(model.Task, request.id)
            await end(request, call)
            return to_proto(task, tasks_pb2.Task)

        async def ListTasks(self, request: Any, call: Call) -> Any:
            wanted = Rows(model.Task).given(model.Task.patient_id, request.patient_id)
            rows, following = await call.page(wanted, request, model.Task.due_time, model.Task.id)
            await end(request, call)
            return tasks_pb2.ListTasksResponse(
                tasks=[to_proto(row, tasks_pb2.Task) for row in rows], next_page_token=following
            )

        async def AssignTask(self, request: Any, call: Call) -> Any:
            task = await call.get(model.Task, request.id, etag=request.etag)
            task.done += 1
            await end(request, call)
            return to_proto(task, tasks_pb2.Task)

        async def ClaimTask(self, request: Any, call: Call) -> Any:
            return await self._move(request, call, "claim")

        async def ReleaseTask(self, request: Any, call: Call) -> Any:
            return await self._move(request, call, "release")

        async def CompleteTask(self, request: Any, call: Call) -> Any:
            return await self._move(request, call, "complete")

        async def SnoozeTask(self, request: Any, call: Call) -> Any:
            """Tells on a row that nothing else changes."""
            task = await call.get(model.Task, request.id)
            task.tell("snoozed")
            await end(request, call)
            return to_proto(task, tasks_pb2.Task)

        async def _move(self, request: Any, call: Call, action: str) -> Any:
            task = await call.get(model.Task, request.id)
            task.move(action)
            await end(request, call)
            return to_proto(task, tasks_pb2.Task)

    class Access:
        async def BatchGetSubjectAccess(self, request: Any, call: Call) -> Any:
            table = call.runtime.tables.access.subject
            rows = await call.db.execute(
                select(table).where(table.c.tenant_id == request.tenant_id, table.c.patient_id.in_(request.subject_ids))
            )
            await end(request, call)
            answer = access_pb2.BatchGetSubjectAccessResponse()
            for row in rows.mappings():
                answer.subjects.append(
                    to_proto({**row, "subject_id": row["patient_id"], "timed_grants": None}, access_pb2.SubjectAccess)
                )
            return answer

        async def ResolvePrincipal(self, request: Any, call: Call) -> Any:
            await end(request, call)
            return access_pb2.ResolvePrincipalResponse()

    class Links:
        async def GetSurveyByLink(self, request: Any, call: Call) -> Any:
            if await call.by_link(model.Task, model.Task.note == request.token) is None:
                raise NotFound("LINK_UNKNOWN")
            return feedback_pb2.SurveyByLink()

        async def AnswerSurveyByLink(self, request: Any, call: Call) -> Any:
            task = await call.by_link(model.Task, model.Task.note == request.token)
            if task is None:
                raise NotFound("LINK_UNKNOWN")
            task.done += 1
            await end(request, call)
            return feedback_pb2.SurveyByLink(answered=True)

    return SimpleNamespace(Pools=Pools, Consents=Consents, Tasks=Tasks, Access=Access, Links=Links)
