"""Group sessions; a seat that is given back is no free slot of the practitioner's."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_FREED_BY = """
CREATE TRIGGER waitlist_freed AFTER UPDATE ON appointment FOR EACH ROW
WHEN (OLD.session_id IS NULL AND OLD.status IN ('PENDING', 'BOOKED', 'ARRIVED', 'CHECKED_IN') AND (
  NEW.status IN ('CANCELLED', 'ENTERED_IN_ERROR')
  OR OLD.start_time <> NEW.start_time OR OLD.end_time <> NEW.end_time
  OR OLD.practitioner_id <> NEW.practitioner_id OR OLD.clinic_id <> NEW.clinic_id))
EXECUTE FUNCTION waitlist_freed()
"""


def upgrade() -> None:
    op.create_table(
        "session",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "status",
            sa.Enum("SCHEDULED", "CANCELLED", name="sessionstatus", native_enum=False, length=40),
            nullable=False,
        ),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("practitioner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("late_cancel_hours", sa.BigInteger(), nullable=False),
        sa.Column("capacity", sa.BigInteger(), nullable=False),
        sa.Column("waitlist_size", sa.BigInteger(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("session_pkey")),
    )
    op.create_index("session_by_clinic", "session", ["tenant_id", "clinic_id", "start_time", "id"], unique=False)
    op.add_column("appointment", sa.Column("session_id", sa.Uuid(as_uuid=False), nullable=True))
    op.add_column("appointment", sa.Column("seat_no", sa.BigInteger(), nullable=True))
    op.create_unique_constraint("appointment_seat_key", "appointment", ["tenant_id", "session_id", "seat_no"])
    op.execute("DROP TRIGGER waitlist_freed ON appointment")
    op.execute(_FREED_BY)
