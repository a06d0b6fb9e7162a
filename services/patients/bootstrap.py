"""What must stand before anybody can call: a tenant's roles, and its first administrator."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from care.access.v1 import access_pb2
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from chassis import access
from chassis.database import Database, Telling
from chassis.ids import new_id
from chassis.settings import Settings
from chassis.telemetry import Telemetry
from chassis.wire import to_proto
from services.patients.roles import SHIPPED
from services.patients.service import SERVICE
from services.patients.staff import Pool, Role, Staff

_TABLES = SERVICE.base.metadata.info["chassis"].access


async def bootstrap(
    database_url: str,
    *,
    tenant_id: str,
    issuer: str,
    subject: str = "",
    given_name: str = "",
    family_name: str = "",
) -> None:
    """Write the shipped roles and pools that a tenant lacks and, with a `subject`, an administrator with that sign-in.

    Goes to the database itself, since before this nobody may call. Doing it again changes nothing but what
    `ship_permissions` does.
    """
    async with _acting(database_url) as db:
        await _roles(db, tenant_id)
        await _pools(db, tenant_id)
        if not subject:
            return
        taken = await db.execute(
            select(Staff.id).where(Staff.tenant_id == tenant_id, Staff.issuer == issuer, Staff.subject == subject)
        )
        if taken.first() is not None:
            return
        staff = Staff(tenant_id=tenant_id, id=new_id())
        staff.change(
            issuer=issuer,
            subject=subject,
            name={"family_name": family_name, "given_names": [given_name]},
            roles=["admin"],
            active=True,
            clinic_ids=[],
            clearances=[],
        )
        db.add(staff)
        await db.flush()
        await access.store_principal(db, _TABLES, to_proto(staff, access_pb2.PrincipalState, **staff.principal))


async def ship_permissions(database_url: str) -> None:
    """Add to every tenant's stored roles the permissions that this release ships with them and no former one did.

    With each migration, since an installation is brought up by nothing else.
    """
    async with _acting(database_url) as db:
        await _roles(db, None)


@asynccontextmanager
async def _acting(database_url: str) -> AsyncIterator[AsyncSession]:
    telemetry = Telemetry.create(SERVICE.name, otlp_endpoint=None, environment="bootstrap", version="0")
    settings = Settings(database_url=database_url, pool_size=1)
    database = Database(settings, telemetry, Telling(SERVICE.name, SERVICE.payloads))
    try:
        async with database.acting("system:patients") as db:
            yield db
    finally:
        await database.stop()
        await telemetry.shutdown(timeout=1)


async def _roles(db: AsyncSession, tenant_id: str | None) -> None:
    """Bring all stored roles up to this release; with a tenant, write those that it lacks, too."""
    stored = select(Role).where(Role.name.in_(SHIPPED)).order_by(Role.tenant_id, Role.name)
    roles = list((await db.execute(stored.with_for_update(key_share=True))).scalars())
    known = {role.name for role in roles if role.tenant_id == tenant_id}
    roles = [role for role in roles if role.ship(SHIPPED[role.name])]
    for name in SHIPPED.keys() - known if tenant_id is not None else ():
        role = Role(tenant_id=tenant_id, id=new_id(), name=name, permissions=[], shipped=[])
        role.ship(SHIPPED[name])
        roles.append(role)
    db.add_all(roles)
    await db.flush()
    for role in roles:
        await access.store_role(db, _TABLES, to_proto(role, access_pb2.RoleState))


async def _pools(db: AsyncSession, tenant_id: str) -> None:
    """One pool per purpose, for all clinics and without members yet: work that falls due must find an owner."""
    rows = (await db.execute(select(Pool.purpose, Pool.name).where(Pool.tenant_id == tenant_id))).all()
    purposes, names = {row.purpose for row in rows}, {row.name for row in rows}
    for purpose, name in _POOLS.items():
        if purpose not in purposes:
            pool = Pool(tenant_id=tenant_id, id=new_id(), staff_ids=[], clinic_ids=[], specialty_codes=[])
            # The shipped one may have been given another purpose since: its name is taken then.
            pool.change(name=name if name not in names else f"{name} {pool.id}", purpose=purpose, active=True)
            db.add(pool)


_POOLS = {
    "coordination": "Care coordination",
    "referrals": "Referrals",
    "urgent": "Urgent",
    "privacy": "Privacy",
}
