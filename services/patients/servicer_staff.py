"""Staff, pools, roles and logins over gRPC."""

from care.access.v1 import access_pb2
from care.patients.v1 import staff_pb2 as pb
from care.patients.v1.staff_pb2_grpc import PoolsServiceServicer, RolesServiceServicer, StaffServiceServicer
from sqlalchemy import select

from chassis import access
from chassis.call import Call, require_etag
from chassis.errors import FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, given, to_proto
from services.patients.patient import Patient, RelatedPerson
from services.patients.roles import PERMISSIONS
from services.patients.staff import Login, Pool, Role, Staff

_KEEPS_ADMIN = {"staff.write", "roles.write"}


class StaffServicer(StaffServiceServicer):
    """Who works here."""

    async def CreateStaff(self, request: pb.CreateStaffRequest, call: Call) -> pb.Staff:
        staff = await call.add(Staff(id=new_id()))
        await _change_staff(call, staff, given(request.staff))
        return to_proto(staff, pb.Staff)

    async def GetStaff(self, request: pb.GetStaffRequest, call: Call) -> pb.Staff:
        return to_proto(await call.get(Staff, request.id), pb.Staff)

    async def ListStaff(self, request: pb.ListStaffRequest, call: Call) -> pb.ListStaffResponse:
        roles = [request.role] if request.role else []
        wanted = Rows(Staff).overlap(Staff.clinic_ids, request.clinic_ids).overlap(Staff.roles, roles)
        rows, following = await call.page(wanted, request, Staff.family_name, Staff.id)
        return pb.ListStaffResponse(staff=[to_proto(row, pb.Staff) for row in rows], next_page_token=following)

    async def UpdateStaff(self, request: pb.UpdateStaffRequest, call: Call) -> pb.Staff:
        staff = await call.get(Staff, request.staff.id, etag=require_etag(request.etag))
        await _change_staff(call, staff, given(request.staff, request.update_mask))
        return to_proto(staff, pb.Staff)

    async def GetSelf(self, request: pb.GetSelfRequest, call: Call) -> pb.Self:
        caller = call.caller
        return pb.Self(
            kind=caller.kind,
            id=caller.id,
            tenant_id=caller.tenant_id,
            roles=sorted(caller.roles),
            permissions=sorted(caller.permissions),
            clinic_ids=caller.group_ids,
        )

    async def CreateLogin(self, request: pb.CreateLoginRequest, call: Call) -> pb.Login:
        wanted = request.login
        kinds = {"Patient": ("PATIENT", Patient), "RelatedPerson": ("RELATED", RelatedPerson)}
        if wanted.person.type not in kinds:
            raise Invalid("PERSON_TYPE", "A login is of a Patient or a RelatedPerson.", field="login.person.type")
        kind, model = kinds[wanted.person.type]
        known = await call.db.execute(
            select(model.id).where(model.tenant_id == call.tenant_id, model.id == wanted.person.id)
        )
        if known.first() is None:
            raise Invalid("PERSON_UNKNOWN", "There is no such person.", field="login.person.id")
        login = await call.add(
            Login(id=new_id(), issuer=wanted.issuer, subject=wanted.subject, kind=kind, person_id=wanted.person.id)
        )
        login.tell("changed", **login.principal)
        await call.db.flush()
        await _keep_principal(call, login)
        return to_proto(login, pb.Login)


class PoolsServicer(PoolsServiceServicer):
    """Teams."""

    async def CreatePool(self, request: pb.CreatePoolRequest, call: Call) -> pb.Pool:
        pool = Pool(id=new_id())
        await _change_pool(call, pool, {"active": True, **given(request.pool)})
        await call.add(pool)
        await call.db.flush()
        return to_proto(pool, pb.Pool)

    async def GetPool(self, request: pb.GetPoolRequest, call: Call) -> pb.Pool:
        return to_proto(await call.get(Pool, request.id), pb.Pool)

    async def ListPools(self, request: pb.ListPoolsRequest, call: Call) -> pb.ListPoolsResponse:
        rows, following = await call.page(Rows(Pool), request, Pool.name, Pool.id)
        return pb.ListPoolsResponse(pools=[to_proto(row, pb.Pool) for row in rows], next_page_token=following)

    async def UpdatePool(self, request: pb.UpdatePoolRequest, call: Call) -> pb.Pool:
        pool = await call.get(Pool, request.pool.id, etag=require_etag(request.etag))
        await _change_pool(call, pool, given(request.pool, request.update_mask))
        await call.db.flush()
        return to_proto(pool, pb.Pool)


class RolesServicer(RolesServiceServicer):
    """What roles may do."""

    async def ListRoles(self, request: pb.ListRolesRequest, call: Call) -> pb.ListRolesResponse:
        rows, following = await call.page(Rows(Role), request, Role.name, Role.id)
        return pb.ListRolesResponse(roles=[to_proto(row, pb.Role) for row in rows], next_page_token=following)

    async def UpdateRole(self, request: pb.UpdateRoleRequest, call: Call) -> pb.Role:
        role = await call.get(Role, request.role.id, etag=require_etag(request.etag))
        values = given(request.role, request.update_mask, read_only=OUTPUT_ONLY | {"name"})
        wanted = values.get("permissions", role.permissions)
        unknown = sorted(set(wanted) - PERMISSIONS)
        if unknown:
            raise Invalid("PERMISSION_UNKNOWN", "A permission doesn't exist.", field="role.permissions")
        if role.name == "admin" and not _KEEPS_ADMIN <= set(wanted):
            raise FailedPrecondition(
                "ADMIN_NEEDED", "Without staff.write and roles.write nobody could ever give a right again."
            )
        role.change(wanted)
        await call.db.flush()
        state = to_proto(role, access_pb2.RoleState)
        await access.store_role(call.db, call.runtime.tables.access, state)
        return to_proto(role, pb.Role)


async def _change_pool(call: Call, pool: Pool, values: dict) -> None:
    wanted = {one.lower() for one in values.get("staff_ids", ())}  # as the database writes a UUID
    known = await call.db.execute(select(Staff.id).where(Staff.tenant_id == call.tenant_id, Staff.id.in_(wanted)))
    if wanted - set(known.scalars()):
        raise Invalid("STAFF_UNKNOWN", "A member is nobody of the staff.", field="pool.staff_ids")
    pool.change(**values)


async def _change_staff(call: Call, staff: Staff, values: dict) -> None:
    if "roles" in values:
        known = set((await call.db.execute(select(Role.name).where(Role.tenant_id == call.tenant_id))).scalars())
        if not set(values["roles"]) <= known:
            raise Invalid("ROLE_UNKNOWN", "A role doesn't exist; GET /v1/roles lists them.", field="staff.roles")
    if values.get("active") is None:
        values.pop("active", None)
    login = staff.change(**values)
    await call.db.flush()
    if login:
        await _keep_principal(call, staff)


async def _keep_principal(call: Call, row: Staff | Login) -> None:
    state = to_proto(row, access_pb2.PrincipalState, **row.principal)
    await access.store_principal(call.db, call.runtime.tables.access, state)
