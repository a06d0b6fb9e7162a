"""The waitlist: entries, offers, what was freed, and the triggers that notice it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_FREED = """
CREATE FUNCTION waitlist_freed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.status = 'PENDING' AND EXISTS (
    SELECT FROM waitlist_offer o WHERE o.tenant_id = OLD.tenant_id AND o.id = OLD.id
  ) THEN
    INSERT INTO waitlist_notice (tenant_id, entry_id, appointment_id)
    SELECT o.tenant_id, o.entry_id, o.id FROM waitlist_offer o
     WHERE o.tenant_id = OLD.tenant_id AND o.id = OLD.id AND o.status = 'OPEN';
  ELSIF OLD.overbooking = 0 AND OLD.start_time > clock_timestamp() AND EXISTS (
    SELECT FROM waitlist_entry e
     WHERE e.tenant_id = OLD.tenant_id AND e.visit_type_id = OLD.visit_type_id AND e.status IN ('WAITING', 'OFFERED')
  ) THEN
    INSERT INTO freed_slot (tenant_id, id, version, visit_type_id, clinic_id, practitioner_id, start_time, end_time,
                            time_zone, cause, status, due_time)
    VALUES (OLD.tenant_id, gen_random_uuid(), 1, OLD.visit_type_id, OLD.clinic_id, OLD.practitioner_id, OLD.start_time,
            OLD.end_time, OLD.time_zone, NEW.status, 'OPEN', clock_timestamp());
  END IF;
  RETURN NULL;
END $$
"""
_FREED_BY = """
CREATE TRIGGER waitlist_freed AFTER UPDATE ON appointment FOR EACH ROW
WHEN (OLD.status IN ('PENDING', 'BOOKED', 'ARRIVED', 'CHECKED_IN') AND (
  NEW.status IN ('CANCELLED', 'ENTERED_IN_ERROR')
  OR OLD.start_time <> NEW.start_time OR OLD.end_time <> NEW.end_time
  OR OLD.practitioner_id <> NEW.practitioner_id OR OLD.clinic_id <> NEW.clinic_id))
EXECUTE FUNCTION waitlist_freed()
"""
_BOOKED = """
CREATE FUNCTION waitlist_booked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO waitlist_notice (tenant_id, entry_id, appointment_id)
  SELECT e.tenant_id, e.id, NEW.id FROM waitlist_entry e
   WHERE e.tenant_id = NEW.tenant_id AND e.patient_id = NEW.patient_id AND e.visit_type_id = NEW.visit_type_id
     AND e.status IN ('WAITING', 'OFFERED') AND e.appointment_id IS DISTINCT FROM NEW.id
     AND NEW.start_time > clock_timestamp();
  RETURN NULL;
END $$
"""
_BOOKED_AT_ONCE = """
CREATE TRIGGER waitlist_booked AFTER INSERT ON appointment FOR EACH ROW
WHEN (NEW.status = 'BOOKED') EXECUTE FUNCTION waitlist_booked()
"""
_BOOKED_LATER = """
CREATE TRIGGER waitlist_booked_later AFTER UPDATE ON appointment FOR EACH ROW
WHEN (NEW.status = 'BOOKED' AND OLD.status <> 'BOOKED') EXECUTE FUNCTION waitlist_booked()
"""


def upgrade() -> None:
    op.create_table(
        "freed_slot",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("practitioner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "OPEN", "OFFERED", "FILLED", "FREE", "GONE", "LATE", name="slotstatus", native_enum=False, length=40
            ),
            nullable=False,
        ),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("offers", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("end_status_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("freed_slot_pkey")),
    )
    op.create_index("freed_slot_by_time", "freed_slot", ["tenant_id", "create_time"], unique=False)
    op.create_index(
        "freed_slot_due", "freed_slot", ["due_time"], unique=False, postgresql_where=sa.text("status = 'OPEN'")
    )
    op.create_table(
        "waitlist_notice",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("no", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("entry_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "no", name=op.f("waitlist_notice_pkey")),
        sa.UniqueConstraint("no", name=op.f("waitlist_notice_no_key")),
    )
    op.create_table(
        "waitlist_entry",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "WAITING",
                "OFFERED",
                "ACCEPTED",
                "FULFILLED",
                "WITHDRAWN",
                "EXPIRED",
                name="entrystatus",
                native_enum=False,
                length=40,
            ),
            nullable=False,
        ),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("practitioner_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("weekdays", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("earliest_time", sa.Text(), nullable=False),
        sa.Column("latest_time", sa.Text(), nullable=False),
        sa.Column("earliest_date", sa.Text(), nullable=False),
        sa.Column("latest_date", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("skips", sa.BigInteger(), nullable=False),
        sa.Column("offer_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("booked_appointment_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("age_band", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="waitlist_entry_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("waitlist_entry_pkey")),
    )
    op.create_index(
        "waitlist_entry_by_patient", "waitlist_entry", ["tenant_id", "patient_id", "create_time", "id"], unique=False
    )
    op.create_index("waitlist_entry_by_time", "waitlist_entry", ["tenant_id", "create_time", "id"], unique=False)
    op.create_index(
        "waitlist_entry_ending",
        "waitlist_entry",
        ["expire_time"],
        unique=False,
        postgresql_where=sa.text("status = 'WAITING'"),
    )
    op.create_index(
        "waitlist_entry_open_key",
        "waitlist_entry",
        ["tenant_id", "patient_id", "visit_type_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('WAITING', 'OFFERED')"),
    )
    op.create_index(
        "waitlist_entry_waiting",
        "waitlist_entry",
        ["tenant_id", "visit_type_id"],
        unique=False,
        postgresql_where=sa.text("status IN ('WAITING', 'OFFERED')"),
    )
    op.create_table(
        "waitlist_offer",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("entry_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("slot_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "OPEN",
                "ACCEPTED",
                "DECLINED",
                "EXPIRED",
                "UNAVAILABLE",
                name="offerstatus",
                native_enum=False,
                length=40,
            ),
            nullable=False,
        ),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("practitioner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answer_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("score", sa.BigInteger(), nullable=False),
        sa.Column("score_parts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("policy_version", sa.BigInteger(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=True),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="waitlist_offer_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("waitlist_offer_pkey")),
        sa.UniqueConstraint("token_hash", name="waitlist_offer_token_key"),
    )
    op.create_index(
        "waitlist_offer_by_entry", "waitlist_offer", ["tenant_id", "entry_id", "create_time", "id"], unique=False
    )
    op.create_index(
        "waitlist_offer_by_patient", "waitlist_offer", ["tenant_id", "patient_id", "create_time", "id"], unique=False
    )
    op.create_index("waitlist_offer_by_time", "waitlist_offer", ["tenant_id", "create_time", "id"], unique=False)
    op.create_index(
        "waitlist_offer_due",
        "waitlist_offer",
        ["expire_time"],
        unique=False,
        postgresql_where=sa.text("status = 'OPEN'"),
    )
    for statement in (_FREED, _FREED_BY, _BOOKED, _BOOKED_AT_ONCE, _BOOKED_LATER):
        op.execute(statement.strip())
