"""Policies: settings of a tenant by key and scope, versioned; every effect stores the version that it used."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

SHIPPED = 0
"""The version of what a service ships with."""
_RANK = {"tenant": 0, "clinic": 1, "visit_type": 2}


class Policy(NamedTuple):
    """What holds now."""

    version: int
    settings: Mapping[str, Any]


async def current(
    db: AsyncSession, tenant_id: str, key: str, shipped: Mapping[str, Any], **scopes: str | None
) -> Policy:
    """The policy in force: visit type before clinic before tenant before what is shipped; what it leaves out is shipped.

    `scopes` are `clinic` and `visit_type` with their ids.
    """
    table = db.info["runtime"].tables.policy
    wanted = {"tenant": tenant_id, **{name: value for name, value in scopes.items() if value}}
    query = (
        select(table.c.scope, table.c.version, table.c.settings)
        .where(
            table.c.tenant_id == tenant_id,
            table.c.key == key,
            or_(*(and_(table.c.scope == scope, table.c.scope_id == value) for scope, value in wanted.items())),
            table.c.effective_time <= db.info["act"].now,
        )
        .order_by(table.c.version)
    )
    rows = (await db.execute(query)).all()
    if not rows:
        return Policy(SHIPPED, shipped)
    best = max(rows, key=lambda row: (_RANK[row.scope], row.version))
    return Policy(best.version, {**shipped, **best.settings})
