"""What must stand before anybody can call: a tenant's roles, and its first administrator."""

from chassis.ids import new_id
from chassis.model import Act
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from services.patients.roles import SHIPPED
from services.patients.staff import Role, Staff


async def shipped_roles(db: AsyncSession, tenant_id: str) -> list[Role]:
    """Add the roles that the tenant doesn't have; answers the new ones."""
    known = set((await db.execute(select(Role.name).where(Role.tenant_id == tenant_id))).scalars())
    added = []
    for name, permissions in SHIPPED.items():
        if name not in known:
            role = Role(tenant_id=tenant_id, id=new_id(), name=name)
            role.change(sorted(permissions))
            db.add(role)
            added.append(role)
    return added


async def first_administrator(
    db: AsyncSession, tenant_id: str, *, issuer: str, subject: str, given_name: str, family_name: str
) -> Staff | None:
    """Make the first administrator; None where that login exists."""
    known = await db.execute(
        select(Staff.id).where(Staff.tenant_id == tenant_id, Staff.issuer == issuer, Staff.subject == subject)
    )
    if known.first() is not None:
        return None
    staff = Staff(tenant_id=tenant_id, id=new_id())
    staff.change(
        issuer=issuer,
        subject=subject,
        name={"family_name": family_name, "given_names": [given_name]},
        roles=["admin"],
    )
    db.add(staff)
    return staff


async def act(db: AsyncSession) -> Act:
    """Who bootstraps."""
    return Act("system:patients", (await db.execute(text("SELECT clock_timestamp()"))).scalar_one())
