"""Access, read through by the other services, and told by a heartbeat."""

import uuid

from care.access.v1 import access_pb2 as pb
from care.access.v1.access_pb2_grpc import AccessServiceServicer
from sqlalchemy import select

from chassis.access import heartbeat_keys
from chassis.call import Call
from chassis.pipeline import Runtime
from chassis.wire import to_proto
from services.patients.staff import Login, Role, Staff

NO_TENANT = str(uuid.UUID(int=0))


class AccessServicer(AccessServiceServicer):
    """Answers from the tables by which patients itself decides."""

    async def BatchGetSubjectAccess(
        self, request: pb.BatchGetSubjectAccessRequest, call: Call
    ) -> pb.BatchGetSubjectAccessResponse:
        table = call.runtime.tables.access.subject
        rows = await call.db.execute(
            select(table).where(table.c.tenant_id == request.tenant_id, table.c.patient_id.in_(request.subject_ids))
        )
        answer = pb.BatchGetSubjectAccessResponse()
        for row in rows.mappings():
            timed = [
                {"grantee_id": one["id"], "expire_time": one["until"], "permissions": one["permissions"]}
                for one in row["timed_grants"]
            ]
            answer.subjects.append(
                to_proto({**row, "subject_id": row["patient_id"], "timed_grants": timed}, pb.SubjectAccess)
            )
        return answer

    async def ResolvePrincipal(self, request: pb.ResolvePrincipalRequest, call: Call) -> pb.ResolvePrincipalResponse:
        answer = pb.ResolvePrincipalResponse()
        for model in (Staff, Login):
            found = await call.one(model, model.issuer == request.issuer, model.subject == request.subject)
            if found is not None:
                answer.principal.CopyFrom(to_proto(found, pb.PrincipalState, **found.principal))
                break
        for role in (await call.db.execute(call.select(Role))).scalars():
            answer.roles.append(to_proto(role, pb.RoleState))
        return answer


_KEYS = heartbeat_keys()


async def beat(runtime: Runtime) -> int:
    """Tell a heartbeat on every partition: whoever hears it has heard all that was told before."""
    async with runtime.database.acting("system:patients") as db:
        for partition, key in enumerate(_KEYS):
            await runtime.database.tell(db, "access.heartbeat", key, NO_TENANT, pb.Heartbeat(partition=partition))
    return 0
