"""Tables that every service has in its own database, added to the metadata that is passed in."""

from typing import NamedTuple

from sqlalchemy import (
    ARRAY,
    DDL,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.event import listen

# Deleted as fast as filled: without an eager vacuum, a read from the start wades through dead rows.
QUEUE_STORAGE = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000"


class Outbox(NamedTuple):
    """`rows` waits to be sent in order of `id`; `aside` names the keys that wait for a person, with the reason.

    Rows of a key that was set aside stay where they are, in order: a row that commits later joins them by itself, and
    deleting the key from `aside` lets all of them go.
    """

    rows: Table
    aside: Table


def outbox_tables(metadata: MetaData) -> Outbox:
    """Events told by this service and not yet acknowledged by the bus. `value` is a serialized envelope."""
    rows = Table(
        "outbox",
        metadata,
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("topic", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("value", LargeBinary, nullable=False),
        Column("traceparent", Text, nullable=False, server_default=""),
        Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    )
    # `create_all` only: a migration says it itself.
    listen(rows, "after_create", DDL(f"ALTER TABLE outbox SET ({QUEUE_STORAGE})"))
    aside = Table(
        "outbox_aside",
        metadata,
        Column("topic", Text, primary_key=True),
        Column("key", Text, primary_key=True),
        Column("reason", Text, nullable=False),
        Column("outbox_id", BigInteger, nullable=False),
        Column("time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
    )
    return Outbox(rows, aside)


def lease_table(metadata: MetaData) -> Table:
    """Who may do a thing that only one may do at a time; `epoch` rises whenever the owner changes."""
    return Table(
        "lease",
        metadata,
        Column("name", Text, primary_key=True),
        Column("owner", Uuid, nullable=False),
        Column("epoch", BigInteger, nullable=False),
        Column("until", DateTime(timezone=True), nullable=False),
    )


def inbox_table(metadata: MetaData) -> Table:
    """One mark per group and event that had its effect, written in the effect's own transaction."""
    return Table(
        "inbox",
        metadata,
        Column("group_name", Text, primary_key=True),
        Column("event_id", Uuid, primary_key=True),
        Column("type", Text, nullable=False),
        Column("time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
        Index("inbox_by_time", "time"),
    )


class Access(NamedTuple):
    """The projection by which a service decides who may see what; patients tells it, nobody else writes it."""

    subject: Table
    principal: Table
    role: Table
    heartbeat: Table


def access_tables(metadata: MetaData) -> Access:
    """`record_subject` has one row per patient; every table about a patient refers to it."""
    subject = Table(
        "record_subject",
        metadata,
        Column("tenant_id", Uuid(as_uuid=False), primary_key=True),
        Column("patient_id", Uuid(as_uuid=False), primary_key=True),
        Column("access_version", BigInteger, nullable=False),
        Column("grantee_ids", ARRAY(Uuid(as_uuid=False)), nullable=False),
        # [{"id", "until", "permissions"}]: proxies and broken glass, judged on the database's clock.
        Column("timed_grants", JSONB, nullable=False, server_default=text("'[]'")),
        Column("security_labels", ARRAY(Text), nullable=False, server_default=text("'{}'")),
        Column("survivor_id", Uuid(as_uuid=False)),
    )
    principal = Table(
        "principal",
        metadata,
        Column("tenant_id", Uuid(as_uuid=False), primary_key=True),
        Column("issuer", Text, primary_key=True),
        Column("subject", Text, primary_key=True),
        Column("id", Uuid(as_uuid=False), nullable=False),
        Column("kind", Text, nullable=False),
        Column("principal_id", Uuid(as_uuid=False), nullable=False),
        Column("roles", ARRAY(Text), nullable=False),
        Column("group_ids", ARRAY(Uuid(as_uuid=False)), nullable=False),
        Column("clearances", ARRAY(Text), nullable=False),
        Column("active", Boolean, nullable=False),
        Column("version", BigInteger, nullable=False),
        # One login, one row: a changed subject must not leave the old one able to sign in.
        UniqueConstraint("tenant_id", "id", name="principal_id_key"),
    )
    role = Table(
        "role_permissions",
        metadata,
        Column("tenant_id", Uuid(as_uuid=False), primary_key=True),
        Column("name", Text, primary_key=True),
        Column("permissions", ARRAY(Text), nullable=False),
        Column("version", BigInteger, nullable=False),
    )
    heartbeat = Table(
        "access_heartbeat",
        metadata,
        Column("partition", Integer, primary_key=True, autoincrement=False),
        Column("time", DateTime(timezone=True), nullable=False),
    )
    return Access(subject, principal, role, heartbeat)


def request_tables(metadata: MetaData) -> None:
    """`idempotency_key` holds answers for replays, `audit` one row per call, never touched again.

    `audit_open` names the rows that no seal covers yet: a trigger fills it, the sealer empties it. No index, since it is
    only ever read from the start.
    """
    Table(
        "idempotency_key",
        metadata,
        Column("tenant_id", Uuid(as_uuid=False), primary_key=True),
        Column("actor", Text, primary_key=True),
        Column("method", Text, primary_key=True),
        Column("request_id", Text, primary_key=True),
        Column("body_hash", LargeBinary, nullable=False),
        Column("response", LargeBinary),
        Column("subject_ids", ARRAY(Uuid(as_uuid=False)), nullable=False, server_default=text("'{}'")),
        Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
        Index("idempotency_key_by_time", "create_time"),
    )
    Table(
        "audit",
        metadata,
        Column("id", Uuid(as_uuid=False), primary_key=True),
        Column("tenant_id", Uuid(as_uuid=False), nullable=False),
        Column("time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
        Column("actor", Text, nullable=False),
        Column("on_behalf_of", Text, nullable=False, server_default=""),
        Column("method", Text, nullable=False),
        Column("permission", Text, nullable=False, server_default=""),
        Column("purpose", Text, nullable=False, server_default=""),
        Column("subject_ids", ARRAY(Uuid(as_uuid=False)), nullable=False, server_default=text("'{}'")),
        Column("outcome", Text, nullable=False),
        Column("trace_id", Text, nullable=False, server_default=""),
        Index("audit_by_subject", "subject_ids", postgresql_using="gin"),
    )
    waiting = Table("audit_open", metadata, Column("id", Uuid(as_uuid=False), nullable=False))
    listen(waiting, "after_create", DDL(f"ALTER TABLE audit_open SET ({QUEUE_STORAGE})"))
    Table(
        "audit_seal",
        metadata,
        Column("seal", BigInteger, primary_key=True, autoincrement=False),
        # All that were sealed so far, with these.
        Column("rows", BigInteger, nullable=False),
        Column("ids", ARRAY(Uuid(as_uuid=False)), nullable=False),
        Column("digests", LargeBinary, nullable=False),
        Column("hash", LargeBinary, nullable=False),
    )
    Table(
        "audit_head",
        metadata,
        Column("name", Text, primary_key=True),
        Column("seal", BigInteger, nullable=False),
        Column("hash", LargeBinary, nullable=False),
    )


def policy_table(metadata: MetaData) -> Table:
    """Policies by key and scope; every effect stores the version that it used."""
    return Table(
        "policy",
        metadata,
        Column("tenant_id", Uuid(as_uuid=False), primary_key=True),
        Column("key", Text, primary_key=True),
        Column("scope", Text, primary_key=True),  # "tenant", "clinic", "visit_type"
        Column("scope_id", Uuid(as_uuid=False), primary_key=True),
        Column("version", BigInteger, primary_key=True),
        Column("effective_time", DateTime(timezone=True), nullable=False, server_default=text("clock_timestamp()")),
        Column("settings", JSONB, nullable=False),
    )


class ChassisTables(NamedTuple):
    """All tables that the chassis brings to a service's database."""

    outbox: Outbox
    inbox: Table
    lease: Table
    access: Access
    policy: Table


def all_tables(metadata: MetaData) -> ChassisTables:
    """Add them all."""
    request_tables(metadata)
    return ChassisTables(
        outbox_tables(metadata),
        inbox_table(metadata),
        lease_table(metadata),
        access_tables(metadata),
        policy_table(metadata),
    )
