"""What a servicer sees of a call: who calls, for which tenant, and the only way to a row."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message
from sqlalchemy import ColumnElement, Select, TextClause, Uuid, and_, bindparam, literal, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from chassis.access import Caller, NeedSubject, seen, sees, visible
from chassis.asking import Known, Sight, fact
from chassis.auth import Identity
from chassis.errors import Aborted, FailedPrecondition, Invalid, NotFound, PermissionDenied, Unauthenticated
from chassis.model import Act, Aggregate, by_id
from chassis.reading import Reading, Rows, Unfit
from chassis.wire import etag_of, given_time

if TYPE_CHECKING:
    from chassis.pipeline import Method, Runtime

A = TypeVar("A", bound=Aggregate)

_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
# When the oldest transaction under way began. A second less: a session shows that it has begun a moment after it did.
# Who verifies the audit reads for up to an hour and writes nothing.
_SETTLED = text(
    "SELECT least(statement_timestamp(), min(xact_start)) - interval '1 second' FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    " AND application_name <> 'care-audit'"
)


class Call:
    """One RPC under way. Lives as long as one try: after `NeedSubject` a new one begins.

    `now` is the database's clock at the begin of the transaction (writes only). `trail` collects whose records the
    call touched and why, for the audit.
    """

    def __init__(
        self,
        runtime: "Runtime",
        method: "Method",
        request: Message,
        caller: Caller,
        confirmed: Sequence[str] = (),
        *,
        looked: bool = False,
    ) -> None:
        self.runtime = runtime
        self.method = method
        self.request = request
        self.caller = caller
        self.confirmed = confirmed
        self.looked = looked
        self.tenant_id = caller.tenant_id
        self.subject_ids: dict[str, None] = {}
        self.purpose = ""
        self.on_behalf_of = ""
        self.source = ""
        self.login: tuple[str, str] = ("", "")
        """Issuer and subject of the caller's token; empty for our own services."""
        # Of a batch: the audit rows of the reads that it joins.
        self.notes: list[dict[str, Any]] = []
        self.known: Known = {}
        self._db: AsyncSession | None = None
        self._reading: Reading | None = None
        self._now: datetime | None = None

    # -- who -----------------------------------------------------------------------------------------------------------

    @property
    def actor(self) -> str:
        """`staff:<id>`, `patient:<id>`, `related:<id>`, `system:<service>` or `link`."""
        return self.caller.actor

    def allows(self, permission: str) -> bool:
        """Whether the caller's roles hold a permission; our own services hold none."""
        return permission in self.caller.permissions

    def require(self, permission: str) -> None:
        """Raises PermissionDenied `PERMISSION_MISSING` where the caller lacks a permission beyond the RPC's own."""
        if not self.allows(permission):
            raise missing(permission)

    def is_of(self, *group_ids: str) -> bool:
        """Whether the caller is staff of one of these groups: for what belongs to a group and to no patient."""
        return self.caller.kind == "staff" and not set(group_ids).isdisjoint(self.caller.group_ids)

    def fact(self, what: str, about: str) -> Any:
        """What another service knows; it is asked outside the transaction, and the method begins anew."""
        return fact(self.known, (what, about))

    # -- session -------------------------------------------------------------------------------------------------------

    @property
    def db(self) -> AsyncSession:
        """The session: one transaction for a write, single statements for a read."""
        if self._db is None:
            assert self._reading is not None, "the call has no session"
            self._db = self._reading.session
        return self._db

    @property
    def now(self) -> datetime:
        """The database's clock when the transaction began."""
        assert self._now is not None, "a read has no clock: compare in SQL with clock_timestamp()"
        return self._now

    async def see_as(self, issuer: str, subject: str) -> bool:
        """From here on the holder of a link sees what the login that made it may see now, and no more.

        Answers whether that login still stands. Raises Unavailable where what it may see can't be told now.
        """
        assert self.caller.kind == "link", "everybody else sees with their own eyes"
        try:
            self.caller = await self.runtime.access.caller(Identity(self.tenant_id, issuer, subject, 0.0, ""))
        except Unauthenticated:
            return False
        self.on_behalf_of = self.caller.actor
        if self._unsure():  # there is nobody to confirm it for
            self.runtime.refuse_stale()
        return True

    async def sees(self, patient_id: str) -> bool:
        """Whether the caller may see a patient's record, as far as this service knows."""
        self.saw(patient_id)
        return bool(await self._seen([patient_id]))

    def begin(self, db: AsyncSession, now: datetime | None = None) -> None:
        """Bind the session; from `now` on changes carry who, for whom and when."""
        self._db, self._now, self._reading = db, now, None
        db.info["known"] = self.known
        if now is not None:
            db.info["act"] = Act(self.actor, now, self.on_behalf_of, self.source)

    def begin_reading(self, reading: Reading) -> None:
        """Bind what a read works with."""
        self._reading = reading

    # -- rows ----------------------------------------------------------------------------------------------------------

    def saw(self, *subject_ids: str | None) -> None:
        """Note in the audit that these patients' records were touched."""
        self.subject_ids.update(dict.fromkeys(one for one in subject_ids if one))

    def select(self, model: type[A]) -> Select[tuple[A]]:
        """Rows of a model that the caller may see; narrow it with `.where`. Not for rows out of a link."""
        if model.subject_field is None or self.caller.kind == "system":
            return select(model).where(model.tenant_id == self.tenant_id)
        return self._joined(model).where(
            model.tenant_id == self.tenant_id,
            visible(model.__tablename__, self._sure(model)),  # type: ignore[attr-defined]
        )

    def _sure(self, model: type[A]) -> dict[str, Any]:
        """What a query for several rows is bound to. Raises NeedSubject where the projection is too old to say no."""
        if model.subject_field is None or self.caller.kind == "system":
            return {}
        self._refuse_link()
        conditions = self._conditions()
        if not conditions["plain"] and not self.confirmed:
            named = self._named_subjects()
            if not named:
                self.runtime.refuse_stale()
            raise NeedSubject(named, stale=True)
        return conditions

    def _joined(self, model: type[A]) -> Select[tuple[A]]:
        subject = self.runtime.access.tables.subject
        return self.runtime.database.statements.once(
            model,
            lambda: select(model).join(
                subject,
                and_(
                    subject.c.tenant_id == model.tenant_id,
                    subject.c.patient_id == getattr(model, model.subject_field or ""),
                ),
            ),
        )

    def _base(self, model: type[A]) -> Select[tuple[A]]:
        """What `select` answers, with names instead of values."""
        tenant = model.tenant_id == bindparam("tenant", type_=Uuid(as_uuid=False))
        if model.subject_field is None or self.caller.kind == "system":
            return select(model).where(tenant)
        return self._joined(model).where(tenant, visible(model.__tablename__))  # type: ignore[attr-defined]

    def _named(self, model: type[A] | None = None) -> dict[str, Any]:
        """Values for the names in `_base`."""
        named = {} if self.caller.kind == "system" else self._conditions()
        if model is not None and model.subject_field is None:
            named = {}
        named["tenant"] = self.tenant_id
        return named

    def scope(self, model: type[A]) -> tuple[TextClause, dict[str, Any]]:
        """The condition under which the caller sees a row of a model, `record_subject` joined to it, and what it is bound to
        (`tenant` among it): for a statement that answers more than rows. Note what is shown with `saw`.
        """
        if self.caller.kind == "system":
            return _EVERYTHING, {"tenant": self.tenant_id}
        self._sure(model)
        return visible(model.__tablename__), self._named(model)  # type: ignore[attr-defined]

    async def get(self, model: type[A], row_id: str, *, etag: str = "", what: str = "NOT_FOUND") -> A:
        """One row, locked against other writers in a write.

        Raises NotFound where it is absent or out of sight (one answer for both), Aborted `ETAG_MISMATCH` where `etag`
        is given and another.
        """
        if not row_id:  # no id at all: the driver would refuse it
            raise NotFound(what)
        unsure = model.subject_field is not None and self._unsure() and not self.confirmed
        # Not sure enough to say no: whom the id is about is confirmed first, alike for one that doesn't exist.
        found = None if unsure else await self._by_id(model, row_id)
        if found is None:
            raise await self._out_of_sight(model, row_id, what)
        self.saw(found.subject_id)
        if etag and etag != etag_of(found.version):
            raise Aborted("ETAG_MISMATCH", "Somebody else has changed it; read it again.")
        return found

    async def one(self, model: type[A], *where: ColumnElement[bool]) -> A | None:
        """The only row that the caller may see under a condition, or None."""
        if model.subject_field is not None and self._unsure() and not self.confirmed:
            # Not sure enough to say no: the subject of the row, if there is one, is confirmed first.
            owner = getattr(model, model.subject_field or "")
            found = await self.db.execute(select(owner).where(model.tenant_id == self.tenant_id, *where))
            subjects = list(found.scalars())
            if not subjects:
                return None
            raise NeedSubject(subjects, stale=True)
        query = self.select(model)
        if self.method.writes:
            query = query.with_for_update(of=model, key_share=True)
        return (await self.db.execute(query.where(*where))).scalar_one_or_none()

    async def _by_id(self, model: type[A], row_id: str) -> A | None:
        if self._reading is not None:
            if model.subject_field is not None:
                self._refuse_link()
            with contextlib.suppress(Unfit):
                rows = await self.runtime.database.statements.fetch(
                    self._reading, Rows(model).equal(model.id, row_id), lambda: self._base(model), self._named(model)
                )
                return rows[0] if rows else None
        return await self.one(model, by_id(model, self.tenant_id, row_id))

    def tenant_wide(self, model: type[A]) -> Select[tuple[A]]:
        """Rows of the whole tenant, for RPCs whose rule says so. Note what is shown with `saw`."""
        if not self.method.rule.tenant_wide:
            raise AssertionError(f"{self.method.name} is not tenant-wide")
        query = select(model).where(model.tenant_id == self.tenant_id)
        return query.with_for_update(of=model, key_share=True) if self.method.writes else query

    async def by_link(self, model: type[A], *where: ColumnElement[bool]) -> A | None:
        """The row that a one-time link names; the link is the right to it. Binds the call to the row's tenant."""
        if not self.method.rule.link:
            raise AssertionError(f"{self.method.name} is not called by link")
        query = select(model).where(*where)
        if self.method.writes:
            query = query.with_for_update(of=model, key_share=True)
        row = (await self.db.execute(query)).scalar_one_or_none()
        if row is not None:
            self.tenant_id = row.tenant_id
            self.saw(row.subject_id)
        return row

    async def add(self, row: A) -> A:
        """Put a new row into the session as this tenant's; its subject must be one that the caller may see."""
        row.tenant_id = self.tenant_id
        subject = row.subject_id
        if subject is not None and self.caller.kind != "link" and model_owner(row) != "subject":
            await self.subject(subject)
        self.db.add(row)
        return row

    async def subject(self, patient_id: str) -> None:
        """Make sure that the caller may see a patient's record. Raises NotFound, in the end."""
        self.saw(patient_id)
        if not await self._seen([patient_id]):
            raise NeedSubject([patient_id], stale=self._unsure())

    def sight(self, patient_id: str) -> Sight:
        """As `subject`, for a statement that asks more."""
        self._refuse_link()
        self.saw(patient_id)
        condition = sees(everybody=self.caller.kind == "system")
        unseen = NeedSubject([patient_id], stale=self._unsure())
        return Sight(condition, {**self._named(), "patient": patient_id}, unseen)

    async def has_staff(self, staff_id: str) -> bool:
        """Whether the tenant has this staff, active. Work may be given to colleagues whom the caller doesn't share a patient with."""
        principal = self.runtime.access.tables.principal
        query = select(principal.c.id).where(
            principal.c.tenant_id == self.tenant_id,
            principal.c.kind == "STAFF",
            principal.c.principal_id == staff_id,
            principal.c.active,
        )
        return (await self.db.execute(query)).first() is not None

    async def _seen(self, patient_ids: Sequence[str]) -> set[str]:
        """Those of these patients whose records the caller may see."""
        self._refuse_link()
        statement = seen(everybody=self.caller.kind == "system")
        values = {**self._named(), "patients": list(patient_ids)}
        return {str(one[0]) for one in await self.records(statement, values)}

    async def records(self, statement: TextClause, values: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        """Rows of a textual statement; in a read an id may be the driver's own kind of UUID."""
        if self._reading is not None:
            with contextlib.suppress(Unfit):
                return await self.runtime.database.statements.records(self._reading, statement, values)
        return (await self.db.execute(statement, values)).all()

    async def all(self, wanted: Rows[A]) -> list[A]:
        """All rows of these that the caller may see; for what the request bounds, such as a list of ids."""
        rows: list[A] | None = None
        if self._reading is not None:
            with contextlib.suppress(Unfit):
                rows = await self._page_short(wanted, (), False, 0)
        if rows is None:
            rows = list((await self.db.execute(wanted.narrow(self.select(wanted.model)))).scalars())
        for row in rows:
            self.saw(row.subject_id)
        return rows

    async def page(
        self,
        wanted: Rows[A],
        request: Message,
        *order: InstrumentedAttribute[Any],
        descending: bool = False,
        default: int = 50,
        most: int = 200,
    ) -> tuple[list[A], str]:
        """A page of what the caller may see, in `order` (all columns one way, the last one unique), and the next page's token.

        Reads `page_size` and `page_token` of the request; a size out of bounds is coerced. Keyset: a page stays right
        while others write. Where the request has an `updated_after`, they are changes: see `_changes`. Raises Invalid
        `PAGE_TOKEN_INVALID` for a token of another query.
        """
        size = min(max(getattr(request, "page_size", 0) or default, 1), most)
        if (since := _updated_after(request)) is not None:
            return await self._changes(wanted, request, since, size)
        token = getattr(request, "page_token", "")
        rows: list[A] | None = None
        key: ColumnElement[bool] | None = None
        if token:
            last = self._last(request, order)
            key = tuple_(*order) < last if descending else tuple_(*order) > last
        elif self._reading is not None:
            with contextlib.suppress(Unfit):
                rows = await self._page_short(wanted, order, descending, size + 1)
        if rows is None:
            query = wanted.narrow(self.select(wanted.model))
            if key is not None:
                query = query.where(key)
            query = query.order_by(*[column.desc() if descending else column for column in order]).limit(size + 1)
            rows = list((await self.db.execute(query)).scalars())
        if not rows and not token:
            await self._look_through()
        following = ""
        if len(rows) > size:
            rows = rows[:size]
            following = self._token(request, [getattr(rows[-1], column.key) for column in order])
        for row in rows:
            self.saw(row.subject_id)
        return rows, following

    async def _changes(self, wanted: Rows[A], request: Message, since: datetime, size: int) -> tuple[list[A], str]:
        """What changed after a time, the oldest change first, and a token that is never empty: one goes on with it for ever.

        Rows get their `update_time` when their transaction begins and are seen when it ends, in another order. So only
        what is older than whatever is under way is shown: nothing can come before it any more, and no reader misses it.
        """
        order = (wanted.model.update_time, wanted.model.id)
        ends: list[Any] = [since, _LAST_ID]
        last: ColumnElement[Any] = tuple_(literal(since, order[0].type), literal(_LAST_ID, order[1].type))
        if request.page_token:  # type: ignore[attr-defined]
            last = self._last(request, order)
        # A statement of its own: it must have looked before the rows' own one does.
        until = (await self.db.execute(_SETTLED)).scalar_one()
        query = wanted.narrow(self.select(wanted.model)).where(tuple_(*order) > last, order[0] < until)
        rows = list((await self.db.execute(query.order_by(*order).limit(size))).scalars())
        if not rows:
            await self._look_through()
            return [], getattr(request, "page_token", "") or self._token(request, ends)
        for row in rows:
            self.saw(row.subject_id)
        return rows, self._token(request, [getattr(rows[-1], column.key) for column in order])

    def _token(self, request: Message, ends: Sequence[Any]) -> str:
        return self.runtime.page_signer.sign([_shape(request, self.actor), *ends])

    def _last(self, request: Message, order: Sequence[InstrumentedAttribute[Any]]) -> ColumnElement[Any]:
        """The key of the row before the page that the request's token asks for."""
        ends = self._ends(request, len(order))
        return tuple_(*[_read_key(column, value) for column, value in zip(order, ends, strict=True)])

    def _ends(self, request: Message, count: int) -> list[Any]:
        opened = self.runtime.page_signer.open(getattr(request, "page_token", ""))
        if not isinstance(opened, list) or len(opened) != count + 1 or opened[0] != _shape(request, self.actor):
            raise Invalid(
                "PAGE_TOKEN_INVALID",
                "The page token is not of this query; begin with the first page.",
                field="page_token",
            )
        return opened[1:]

    def page_asked(
        self, request: Message, *kinds: type, default: int = 50, most: int = 200
    ) -> tuple[int, tuple[Any, ...] | None]:
        """As `page` reads a request, for a statement of one's own: (size, where the page before ended, if there was one)."""
        size = min(max(getattr(request, "page_size", 0) or default, 1), most)
        if not getattr(request, "page_token", ""):
            return size, None
        ends = zip(kinds, self._ends(request, len(kinds)), strict=True)
        return size, tuple(datetime.fromisoformat(end) if kind is datetime else kind(end) for kind, end in ends)

    def page_after(self, request: Message, *ends: Any) -> str:
        """The token of the page that goes on there."""
        return self._token(request, ends)

    async def _page_short(
        self, wanted: Rows[A], order: Sequence[InstrumentedAttribute[Any]], descending: bool, limit: int
    ) -> list[A]:
        assert self._reading is not None
        self._sure(wanted.model)
        return await self.runtime.database.statements.fetch(
            self._reading,
            wanted,
            lambda: self._base(wanted.model),
            self._named(wanted.model),
            order=order,
            descending=descending,
            limit=limit,
        )

    async def _look_through(self) -> None:
        """Nothing was found of patients whom the request names: is it that this service can't see them yet?"""
        named = self._requested_subjects()
        if not named or self.looked or self.caller.kind in ("system", "link"):
            return
        hidden = set(named) - await self._seen(named)
        if hidden:
            raise NeedSubject(hidden, optional=True)

    def _requested_subjects(self) -> list[str]:
        named: list[str] = []
        for name in ("patient_id", "patient_ids"):
            value = getattr(self.request, name, None)
            named += [value] if isinstance(value, str) else list(value or ())
        return [one for one in named if one]

    def _named_subjects(self) -> list[str]:
        """Patients whom the request names, or the patient who calls."""
        return self._requested_subjects() or ([self.caller.id] if self.caller.kind == "patient" else [])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _conditions(self) -> dict[str, Any]:
        return self.runtime.access.conditions(self.caller, self.method.rule.permission, self.confirmed)

    def _unsure(self) -> bool:
        """Whether the projection is too old for this caller."""
        return self.caller.kind not in ("system", "link") and not self._conditions()["plain"]

    def _refuse_link(self) -> None:
        if self.caller.kind == "link":
            raise AssertionError("a link names its own row only: use by_link")

    async def _out_of_sight(self, model: type[A], row_id: str, what: str) -> Exception:
        if model.subject_field is None or self.caller.kind == "system":
            return NotFound(what)
        # Whose record it is, to read that through; for an id that doesn't exist the same calls are made with the id.
        column = getattr(model, model.subject_field)
        owner = (await self.db.execute(select(column).where(by_id(model, self.tenant_id, row_id)))).scalar_one_or_none()
        return NeedSubject([owner or row_id], stale=self._unsure())


_EVERYTHING = text("true")


def model_owner(row: Aggregate) -> str:
    """`subject` for the row that is itself the record subject (the patient), else `row`."""
    return "subject" if row.subject_field == "id" else "row"


def missing(permission: str) -> PermissionDenied:
    """The refusal for a lacking permission."""
    return PermissionDenied(
        "PERMISSION_MISSING", f"Your roles don't include the permission {permission}.", permission=permission
    )


def require_etag(etag: str) -> str:
    """The etag of an update. Raises FailedPrecondition `ETAG_REQUIRED` without one."""
    if not etag:
        raise FailedPrecondition("ETAG_REQUIRED", "Send the etag that you read (If-Match over HTTP).")
    return etag


def _updated_after(request: Message) -> datetime | None:
    return given_time(request, "updated_after") if "updated_after" in request.DESCRIPTOR.fields_by_name else None


def _shape(request: Message, actor: str) -> str:
    """A fingerprint of a list request without its page fields: a token serves only the query and the caller it came from."""
    bare = type(request)()
    bare.CopyFrom(request)
    for name in ("page_token", "page_size"):
        if name in request.DESCRIPTOR.fields_by_name:
            bare.ClearField(name)
    # With its name: two lists' requests may well look alike.
    query = f"{actor} {request.DESCRIPTOR.full_name}\0".encode() + bare.SerializeToString(deterministic=True)
    return hashlib.blake2b(query, digest_size=8).hexdigest()


def _read_key(column: InstrumentedAttribute[Any], value: Any) -> Any:
    kind = column.type.python_type
    return literal(kind.fromisoformat(value) if kind in (datetime, date) else value, column.type)


__all__: Sequence[str] = ["Call", "missing", "require_etag"]
