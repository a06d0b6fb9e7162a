"""Who may see whom, decided in every service from its own projection, read through where that can't be sure."""

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from care.access.v1 import access_pb2
from sqlalchemy import ARRAY, Boolean, DateTime, Integer, Text, Uuid, bindparam, delete, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.sql.elements import TextClause

from chassis.auth import Identity
from chassis.bus import PARTITIONS, partition_of
from chassis.errors import Problem, Unauthenticated, Unavailable
from chassis.projections import keep_newer
from chassis.reading import Unfit
from chassis.tables import Access as AccessTables
from chassis.wire import to_time

_DENIES_FREE, _DENIES_WINDOW, _DENIES_PAUSE = 20, 10.0, 2.0
_CALLERS_AT_MOST = 10_000


class NeedSubject(Exception):
    """A row that is about these subjects is out of sight by the local projection: read through and try once more.

    `stale` says that the projection itself wasn't sure enough, rather than that it said no; `optional` that without it
    the answer is an empty list, not a refusal.
    """

    def __init__(self, subject_ids: Iterable[str], *, stale: bool = False, optional: bool = False) -> None:
        super().__init__()
        self.subject_ids = [one for one in subject_ids if one]
        self.stale = stale
        self.optional = optional


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as this service's projection knows them."""

    kind: str
    """`staff`, `patient`, `related`, `system` or `link`."""
    id: str
    tenant_id: str
    permissions: frozenset[str] = frozenset()
    roles: tuple[str, ...] = ()
    group_ids: tuple[str, ...] = ()
    clearances: tuple[str, ...] = ()

    @property
    def actor(self) -> str:
        """As it stands in events, history and audit."""
        return "link" if self.kind == "link" else f"{self.kind}:{self.id}"

    @property
    def mine(self) -> list[str]:
        """Ids by which records may be granted to this caller."""
        return [self.id, *self.group_ids]


_PRINCIPAL_TEXT = text("""
SELECT p.kind, p.principal_id, p.roles, p.group_ids, p.clearances, p.active,
       coalesce((SELECT array_agg(DISTINCT one) FROM role_permissions r, unnest(r.permissions) AS one
                  WHERE r.tenant_id = p.tenant_id AND r.name = ANY(p.roles)), '{}') AS permissions
  FROM principal p
 WHERE p.tenant_id = :tenant AND p.issuer = :issuer AND p.subject = :subject
""").bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("issuer", type_=Text), bindparam("subject", type_=Text)
)  # fmt: skip
_PRINCIPAL = _PRINCIPAL_TEXT.columns(
    kind=Text, principal_id=Uuid(as_uuid=False), roles=ARRAY(Text), group_ids=ARRAY(Uuid(as_uuid=False)),
    clearances=ARRAY(Text), active=Boolean, permissions=ARRAY(Text),
)  # fmt: skip
Fetch = Callable[[TextClause, Mapping[str, Any]], Awaitable[list[Sequence[Any]]]]
"""`chassis.database.Database.fetch`."""


def _principal(row: Sequence[Any]) -> dict[str, Any]:
    kind, principal_id, roles, group_ids, clearances, active, permissions = row
    return {
        "kind": kind,
        "principal_id": str(principal_id),
        "roles": roles,
        "group_ids": [str(one) for one in group_ids],
        "clearances": clearances,
        "active": active,
        "permissions": permissions,
    }


class Owner(Protocol):
    """The service that owns access: patients, over gRPC or in its own process."""

    async def subjects(self, tenant_id: str, subject_ids: Sequence[str]) -> Sequence[access_pb2.SubjectAccess]:
        """Access sets of the subjects that exist. Raises Problem where it can't be asked."""

    async def principal(self, tenant_id: str, issuer: str, subject: str) -> access_pb2.ResolvePrincipalResponse:
        """Who a login is."""


# Permanent grants count where the labels are cleared; a timed grant is personal and counts by itself.
_VISIBLE = """
(
  ((:plain OR record_subject.patient_id = ANY(:confirmed)) AND record_subject.grantee_ids && :mine
   AND (:all_labels OR (record_subject.security_labels <@ :clearances {labels})))
  OR ((:timed OR record_subject.patient_id = ANY(:confirmed)) AND record_subject.timed_grants <> '[]' AND EXISTS (
    SELECT FROM jsonb_to_recordset(record_subject.timed_grants)
             AS g(id uuid, until timestamptz, permissions jsonb)
     WHERE g.id = ANY(:mine) AND g.until > clock_timestamp()
       AND (g.permissions IS NULL OR g.permissions = '[]' OR g.permissions ? :permission)))
)
"""


def visible(table: str | None, params: dict[str, Any] | None = None) -> TextClause:
    """The condition on `record_subject` (joined) under which a caller sees a row of `table` with its labels.

    Without `params` they are still to be given, by the names of `Access.conditions`.
    """
    clause = _visible(table)
    if params is None:
        return clause
    # A clause with values: making it anew would parse the text each time.
    return clause.bindparams(**params)


@cache
def _visible(table: str | None) -> TextClause:
    labels = f"AND {table}.security_labels <@ :clearances" if table else ""
    return text(_VISIBLE.format(labels=labels)).bindparams(
        bindparam("plain", type_=Boolean),
        bindparam("timed", type_=Boolean),
        bindparam("all_labels", type_=Boolean),
        bindparam("confirmed", type_=ARRAY(Uuid(as_uuid=False))),
        bindparam("mine", type_=ARRAY(Uuid(as_uuid=False))),
        bindparam("clearances", type_=ARRAY(Text)),
        bindparam("permission", type_=Text),
    )


@cache
def sees(*, everybody: bool) -> TextClause:
    """The condition that `patient` of a `tenant` is there, and seen by the caller of `visible`'s parameters or by everybody."""
    scoped = _visible(None)
    condition = "" if everybody else f" AND {scoped.text}"
    clause = text(
        f"EXISTS (SELECT FROM record_subject WHERE tenant_id = :tenant AND patient_id = :patient{condition})"
    ).bindparams(bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("patient", type_=Uuid(as_uuid=False)))
    return clause if everybody else clause.bindparams(*scoped._bindparams.values())


@cache
def seen(*, everybody: bool) -> TextClause:
    """Which of `patients` of a `tenant` are there, and seen by the caller of `visible`'s parameters or by everybody."""
    scoped = _visible(None)
    condition = "" if everybody else f" AND {scoped.text}"
    statement = text(
        f"SELECT patient_id FROM record_subject WHERE tenant_id = :tenant AND patient_id = ANY(:patients){condition}"
    ).bindparams(
        bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("patients", type_=ARRAY(Uuid(as_uuid=False)))
    )
    return statement if everybody else statement.bindparams(*scoped._bindparams.values())


class Access:
    """One service's view of who may see whom.

    `owner` is asked on a miss and on a deny. `is_owner` is patients itself, whose tables are the truth: it neither
    waits for heartbeats nor reads through.
    """

    def __init__(
        self,
        tables: AccessTables,
        engine: AsyncEngine,
        owner: Owner | None,
        *,
        is_owner: bool = False,
        stale_patient: float = 30.0,
        stale_staff: float = 900.0,
        principal_cache: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        fetch: Fetch | None = None,
    ) -> None:
        self.tables = tables
        self._fetch = fetch
        self._looking: dict[tuple[str, str, str], asyncio.Task[Caller]] = {}
        self._forgotten = 0
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._owner = owner
        self.is_owner = is_owner
        self._stale_patient, self._stale_staff = stale_patient, stale_staff
        self._cache_for = principal_cache
        self._clock = clock
        self._callers: OrderedDict[tuple[str, str, str], tuple[float, Caller]] = OrderedDict()
        self._denies: OrderedDict[str, deque[float]] = OrderedDict()
        self._heard_age = float("inf")
        self._heard_at = clock()

    # -- who calls -----------------------------------------------------------------------------------------------------

    async def caller(self, identity: Identity) -> Caller:
        """The principal behind a token. Raises Unauthenticated `LOGIN_UNKNOWN` or `LOGIN_INACTIVE`."""
        key = (identity.tenant_id, identity.issuer, identity.subject)
        known = self._callers.get(key)
        if known is not None and known[0] > self._clock():
            return known[1]
        if not self._cache_for:
            return await self._find_caller(key)
        looking = self._looking.get(key)
        if looking is None:  # one look for all who come with this login meanwhile
            looking = self._looking[key] = asyncio.create_task(self._find_caller(key))
            looking.add_done_callback(lambda done: self._looked(key, done))
        return await asyncio.shield(looking)

    def _looked(self, key: tuple[str, str, str], done: "asyncio.Task[Caller]") -> None:
        if self._looking.get(key) is done:
            del self._looking[key]
        if not done.cancelled():
            done.exception()  # whoever waits has it

    async def _find_caller(self, key: tuple[str, str, str]) -> Caller:
        forgotten = self._forgotten
        stored = await self._stored_principal(key)
        if (stored is None or self._must_confirm(stored["kind"])) and self._owner is not None:
            # Anybody can get a token of an open issuer: who has no login here must not become an amplifier.
            asked_for = "login " + " ".join(key)
            if stored is None and self._is_spent(asked_for):
                raise _unknown_login()
            try:
                answer = await self._owner.principal(*key)
            except Problem as error:
                raise Unavailable(
                    "ACCESS_UNCONFIRMED",
                    "Your login can't be confirmed now since the patients service is away; try again.",
                ) from error
            async with self._engine.connect() as connection:
                if answer.HasField("principal"):
                    await free_login(connection, self.tables, answer.principal)
                    await store_principal(connection, self.tables, answer.principal)
                else:
                    self._times(asked_for).append(self._clock())
                for role in answer.roles:
                    await store_role(connection, self.tables, role)
            stored = await self._stored_principal(key) if answer.HasField("principal") else None
        if stored is None:
            raise _unknown_login()
        if not stored["active"]:
            raise Unauthenticated("LOGIN_INACTIVE", "This login is switched off.")
        caller = Caller(
            kind=stored["kind"].lower(),
            id=stored["principal_id"],
            tenant_id=key[0],
            permissions=frozenset(stored["permissions"]),
            roles=tuple(stored["roles"]),
            group_ids=tuple(stored["group_ids"]),
            clearances=tuple(stored["clearances"]),
        )
        if forgotten == self._forgotten:  # else it may be what was to be forgotten
            self._callers[key] = (self._clock() + self._cache_for, caller)
        while len(self._callers) > _CALLERS_AT_MOST:
            self._callers.popitem(last=False)
        return caller

    async def _stored_principal(self, key: tuple[str, str, str]) -> dict[str, Any] | None:
        wanted = dict(zip(("tenant", "issuer", "subject"), key, strict=True))
        if self._fetch is not None:
            with contextlib.suppress(Unfit):
                found = await self._fetch(_PRINCIPAL_TEXT, wanted)
                return _principal(found[0]) if found else None
        async with self._engine.connect() as connection:
            stored = await connection.execute(_PRINCIPAL, wanted)
            row = stored.mappings().first()
        return dict(row) if row is not None else None

    def forget_callers(self) -> None:
        """Roles or logins changed: ask the projection again."""
        self._forgotten += 1
        self._callers.clear()
        self._looking.clear()  # whoever comes from now on waits for no look that began before

    # -- how sure the projection is ------------------------------------------------------------------------------------

    async def watch(self, interval: float = 1.0) -> None:
        """Keep reading the age of the oldest partition's heartbeat; runs until it is cancelled."""
        query = text(
            "SELECT count(*) AS parts, extract(epoch FROM clock_timestamp() - min(time))::float8 AS age"
            " FROM access_heartbeat"
        )
        while True:
            with contextlib.suppress(Exception):  # a database that is away leaves the age growing
                async with self._engine.connect() as connection:
                    row = (await connection.execute(query)).one()
                self._heard_age = row.age if row.parts == PARTITIONS else float("inf")
                self._heard_at = self._clock()
            # Just started, nothing heard yet: the first heartbeat is worth looking for.
            await asyncio.sleep(interval if self._heard_age != float("inf") else interval / 10)

    @property
    def age(self) -> float:
        """Seconds since everything told by patients was known to have arrived."""
        return 0.0 if self.is_owner else self._heard_age + (self._clock() - self._heard_at)

    def _must_confirm(self, kind: str) -> bool:
        return self.age > (self._stale_staff if kind == "STAFF" else self._stale_patient)

    def conditions(self, caller: Caller, permission: str, confirmed: Sequence[str] = ()) -> dict[str, Any]:
        """Parameters of `visible` for this caller; `confirmed` are the subjects that were read live a moment ago."""
        own = caller.kind != "staff"
        limit = self._stale_patient if own else self._stale_staff
        return {
            "plain": self.age <= limit,
            "timed": self.age <= self._stale_patient,
            "confirmed": list(confirmed),
            "all_labels": own,
            "mine": caller.mine,
            "clearances": list(caller.clearances),
            "permission": permission,
        }

    async def labels(self, tenant_id: str, subject_ids: Sequence[str]) -> dict[str, frozenset[str]]:
        """The labels of these records, as the projection knows them."""
        wanted = {"tenant": tenant_id, "subjects": list(subject_ids)}
        async with self._engine.connect() as connection:
            return {str(one): frozenset(labels) for one, labels in await connection.execute(_LABELS, wanted)}

    # -- reading through -----------------------------------------------------------------------------------------------

    def may_read_through(self, caller: Caller) -> bool:
        """Whether a deny may ask the owner: 20 in 10 s always, beyond that one in 2 s, so that random ids don't amplify."""
        if self._owner is None or self.is_owner:
            return False
        if self._is_spent(caller.actor):
            return False
        self._times(caller.actor).append(self._clock())
        return True

    def _is_spent(self, who: str) -> bool:
        times = self._times(who)
        return len(times) >= _DENIES_FREE and self._clock() - times[-1] < _DENIES_PAUSE

    def _times(self, who: str) -> deque[float]:
        times = self._denies.setdefault(who, deque(maxlen=_DENIES_FREE + 1))
        self._denies.move_to_end(who)
        while len(self._denies) > _CALLERS_AT_MOST:
            self._denies.popitem(last=False)
        while times and self._clock() - times[0] > _DENIES_WINDOW:
            times.popleft()
        return times

    def granted(self, caller: Caller, asked: int) -> None:
        """The last `asked` questions were no denies: they don't count."""
        times = self._denies.get(caller.actor)
        for _ in range(min(asked, len(times) if times else 0)):
            times.pop()  # type: ignore[union-attr]

    async def read_through(self, tenant_id: str, subject_ids: Sequence[str]) -> list[str]:
        """Fetch access sets from the owner and merge them by version; answers whose, 100 at most.

        Raises Unavailable `ACCESS_UNCONFIRMED`.
        """
        if self._owner is None:
            return []
        asked = list(dict.fromkeys(subject_ids))[:100]
        try:
            found = await self._owner.subjects(tenant_id, asked)
        except Problem as error:
            raise Unavailable(
                "ACCESS_UNCONFIRMED", "Access can't be confirmed now since the patients service is away; try again."
            ) from error
        async with self._engine.connect() as connection:
            for subject in found:
                await store_subject(connection, self.tables, subject)
            for _ in asked[len(found) :]:  # an id that doesn't exist takes as many round trips as a hidden one
                await connection.execute(_NOTHING)
        return asked


_NOTHING = text("SELECT FROM record_subject WHERE false")
_LABELS = text(
    "SELECT patient_id, security_labels FROM record_subject WHERE tenant_id = :tenant AND patient_id = ANY(:subjects)"
).bindparams(bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("subjects", type_=ARRAY(Uuid(as_uuid=False))))
# Not later than now: a clock that is ahead must not make the projection look fresh for ever.
_HEARTBEAT = text("""
INSERT INTO access_heartbeat AS mine (partition, time) VALUES (:partition, least(:told, clock_timestamp()))
ON CONFLICT (partition) DO UPDATE SET time = greatest(mine.time, excluded.time)
""").bindparams(bindparam("partition", type_=Integer), bindparam("told", type_=DateTime(timezone=True)))


def _unknown_login() -> Unauthenticated:
    return Unauthenticated("LOGIN_UNKNOWN", "This login is not known here; ask an administrator to add it.")


_Executes = AsyncConnection | AsyncSession


async def store_subject(db: _Executes, tables: AccessTables, state: access_pb2.SubjectAccess) -> None:
    """Merge one access set; an older version changes nothing."""
    values = {
        "tenant_id": state.tenant_id,
        "patient_id": state.subject_id,
        "access_version": state.access_version,
        "grantee_ids": list(state.grantee_ids),
        "timed_grants": [
            {
                "id": grant.grantee_id,
                "until": to_time(grant.expire_time).isoformat(),
                "permissions": list(grant.permissions),
            }
            for grant in state.timed_grants
        ],
        "security_labels": list(state.security_labels),
        "survivor_id": state.survivor_id or None,
    }
    await keep_newer(db, tables.subject, values, key=("tenant_id", "patient_id"), version="access_version")


async def store_principal(db: _Executes, tables: AccessTables, state: access_pb2.PrincipalState) -> None:
    """Merge one login; an older version changes nothing. A subject that the login had before stops working."""
    values = {
        "tenant_id": state.tenant_id,
        "issuer": state.issuer,
        "subject": state.subject,
        "id": state.id,
        "kind": access_pb2.PrincipalState.Kind.Name(state.kind),
        "principal_id": state.principal_id,
        "roles": list(state.roles),
        "group_ids": list(state.group_ids),
        "clearances": list(state.clearances),
        "active": state.active,
        "version": state.version,
    }
    await keep_newer(db, tables.principal, values)


async def free_login(db: _Executes, tables: AccessTables, state: access_pb2.PrincipalState) -> bool:
    """Drop another login's row that stands in the way of this one: its subject was given on, the event is still to come.

    Answers whether there was one. An older state than the stored one drops nothing.
    """
    mine, other = tables.principal.alias(), tables.principal
    newer = select(mine.c.id).where(
        mine.c.tenant_id == state.tenant_id, mine.c.id == state.id, mine.c.version >= state.version
    )
    gone: Any = await db.execute(
        delete(other)
        .where(other.c.tenant_id == state.tenant_id, other.c.issuer == state.issuer, other.c.subject == state.subject)
        .where(other.c.id != state.id, ~newer.exists())
    )
    return bool(gone.rowcount)


async def hear_principal(db: _Executes, tables: AccessTables, state: access_pb2.PrincipalState) -> None:
    """Merge one login that an event told. Two logins' events come in any order: where one subject is claimed by both,
    neither is kept, and the owner is asked at the next call.
    """
    if not await free_login(db, tables, state):
        await store_principal(db, tables, state)
        return
    mine = tables.principal
    await db.execute(
        delete(mine).where(mine.c.tenant_id == state.tenant_id, mine.c.id == state.id, mine.c.version < state.version)
    )


async def store_role(db: _Executes, tables: AccessTables, state: access_pb2.RoleState) -> None:
    """Merge one role; an older version changes nothing."""
    values = {
        "tenant_id": state.tenant_id,
        "name": state.name,
        "permissions": list(state.permissions),
        "version": state.version,
    }
    await keep_newer(db, tables.role, values, key=("tenant_id", "name"))


async def store_heartbeat(db: _Executes, tables: AccessTables, partition: int, told_at: Any) -> None:
    """Note that everything told on a partition up to `told_at` has arrived."""
    await db.execute(_HEARTBEAT, {"partition": partition, "told": told_at})


def heartbeat_keys() -> list[str]:
    """One key per partition, always the same ones: a heartbeat on each proves that all told before has arrived."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < PARTITIONS:
        key = str(uuid.uuid5(uuid.NAMESPACE_OID, f"access heartbeat {number}"))
        found.setdefault(partition_of(key, PARTITIONS), key)
        number += 1
    return [found[partition] for partition in range(PARTITIONS)]
