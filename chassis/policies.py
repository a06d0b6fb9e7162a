"""Policies: settings of a tenant by key and scope, versioned; every effect stores the version that it used."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, DateTime, Text, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

SHIPPED = 0
"""The version of what a service ships with."""
_RANK = {"tenant": 0, "clinic": 1, "visit_type": 2}
_IN_FORCE = text("""
SELECT p.scope, p.version, p.settings FROM policy p
  JOIN unnest(:scopes, :scope_ids) AS wanted(scope, scope_id) USING (scope, scope_id)
 WHERE p.tenant_id = :tenant AND p.key = :key AND p.effective_time <= :now
""").bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("key", type_=Text),
    bindparam("scopes", type_=ARRAY(Text)),
    bindparam("scope_ids", type_=ARRAY(Uuid(as_uuid=False))),
    bindparam("now", type_=DateTime(timezone=True)),
).columns(settings=JSONB)  # fmt: skip


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
    wanted = {"tenant": tenant_id, **{name: value for name, value in scopes.items() if value}}
    values = {"tenant": tenant_id, "key": key, "scopes": list(wanted), "scope_ids": list(wanted.values())}
    rows = (await db.execute(_IN_FORCE, {**values, "now": db.info["act"].now})).all()
    if not rows:
        return Policy(SHIPPED, shipped)
    best = max(rows, key=lambda row: (_RANK[row.scope], row.version))
    return Policy(best.version, {**shipped, **best.settings})
