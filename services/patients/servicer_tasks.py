"""The worklist over gRPC."""

from care.patients.v1 import tasks_pb2 as pb
from care.patients.v1.tasks_pb2_grpc import TasksServiceServicer
from care.type.v1 import type_pb2
from sqlalchemy import func, or_, text

from chassis.call import Call
from chassis.errors import Invalid, PermissionDenied
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, given, given_time, plain, to_proto, to_time
from services.patients.labels import labels_of
from services.patients.staff import Pool, Staff
from services.patients.task import Task

_READ_ONLY = OUTPUT_ONLY | {"due_basis", "status", "snooze_time", "outcome", "history", "security_labels"}
# As constants: with parameters a generic plan can't use the worklist's partial index.
_OPEN_ONLY = text("task.status IN ('READY', 'IN_PROGRESS')")
_AWAKE = or_(Task.snooze_time.is_(None), Task.snooze_time <= func.clock_timestamp())


class TasksServicer(TasksServiceServicer):
    """Tasks of coordinators."""

    async def CreateTask(self, request: pb.CreateTaskRequest, call: Call) -> pb.Task:
        values = given(request.task, read_only=_READ_ONLY)
        if "due_time" not in values:
            raise Invalid("DUE_TIME_MISSING", "A task needs a due time.", field="task.due_time")
        owner = values.pop("owner", None)
        if owner is None:
            owner = {"type": "Staff", "id": _staff(call)}
        else:
            await _known_owner(call, request.task.owner, "task.owner")
        source = values.pop("source", {"type": "Patient", "id": values["patient_id"]})
        about = {"source_id": source["id"], "clinic_id": values.get("clinic_id")}
        labels = await labels_of(call.db, call.tenant_id, values["patient_id"], **about)
        task = Task(
            id=new_id(), source=source, source_id=source["id"], due_basis="stated", security_labels=labels, **values
        )
        # By hand as often as somebody likes: each is its own episode.
        task.episode = task.id
        task.own(owner["type"], owner["id"])
        task.move("create", reason_code=task.reason_code or "")
        await call.add(task)
        await call.db.flush()
        return to_proto(task, pb.Task)

    async def GetTask(self, request: pb.GetTaskRequest, call: Call) -> pb.Task:
        return to_proto(await call.get(Task, request.id), pb.Task)

    async def ListTasks(self, request: pb.ListTasksRequest, call: Call) -> pb.ListTasksResponse:
        if request.patient_id:
            await call.subject(request.patient_id)
        wanted = (
            Rows(Task)
            .given(Task.patient_id, request.patient_id)
            .among(Task.status, enum_names(pb.Task.Status, request.statuses))
            .among(Task.owner_id, request.owner_ids)
            .among(Task.clinic_id, request.clinic_ids)
            .among(Task.code, request.codes)
            .before(Task.due_time, given_time(request, "due_before"))
        )
        changes = request.HasField("updated_after")
        if not request.statuses and not changes:
            wanted.where(_OPEN_ONLY)
        if not request.include_snoozed and not changes:
            wanted.where(_AWAKE)
        rows, following = await call.page(wanted, request, Task.due_time, Task.id)
        return pb.ListTasksResponse(tasks=[to_proto(row, pb.Task) for row in rows], next_page_token=following)

    async def AssignTask(self, request: pb.AssignTaskRequest, call: Call) -> pb.Task:
        task = await call.get(Task, request.id, etag=request.etag)
        await _known_owner(call, request.owner, "owner")
        task.assign(request.owner.type, request.owner.id)
        return await _answer(call, task)

    async def ClaimTask(self, request: pb.ClaimTaskRequest, call: Call) -> pb.Task:
        task = await call.get(Task, request.id)
        task.claim(_staff(call))
        return await _answer(call, task)

    async def ReleaseTask(self, request: pb.ReleaseTaskRequest, call: Call) -> pb.Task:
        task = await call.get(Task, request.id)
        task.release()
        return await _answer(call, task)

    async def SnoozeTask(self, request: pb.SnoozeTaskRequest, call: Call) -> pb.Task:
        task = await call.get(Task, request.id)
        task.snooze(to_time(request.snooze_time), call.now)
        return await _answer(call, task)

    async def CompleteTask(self, request: pb.CompleteTaskRequest, call: Call) -> pb.Task:
        task = await call.get(Task, request.id)
        task.complete(plain(request.outcome))
        return await _answer(call, task)


async def _answer(call: Call, task: Task) -> pb.Task:
    await call.db.flush()
    return to_proto(task, pb.Task)


def _staff(call: Call) -> str:
    if call.caller.kind != "staff":
        raise PermissionDenied("STAFF_ONLY", "Only staff can own tasks.")
    return call.caller.id


async def _known_owner(call: Call, owner: type_pb2.Reference, field: str) -> None:
    """Raises Invalid `OWNER_UNKNOWN` unless it is somebody who works here or a pool in use."""
    model = {"Staff": Staff, "Pool": Pool}.get(owner.type)
    known = None
    if model is not None:
        # Not locked: two tasks given to one pool need not wait for each other.
        query = call.select(model).where(model.id == owner.id, model.active)
        known = (await call.db.execute(query)).scalar_one_or_none()
    if known is None:
        raise Invalid("OWNER_UNKNOWN", "The owner must be active staff or a pool in use.", field=field)
