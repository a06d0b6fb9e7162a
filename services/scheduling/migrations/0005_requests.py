"""Requests for visits, patients' wishes, and what they need to know of pools and referrals."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pool",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("pool_pkey")),
    )
    op.create_table(
        "referral_state",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("business_status", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("referral_state_pkey")),
    )
    op.create_table(
        "scheduling_preferences",
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
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("practitioner_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("weekdays", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("earliest", sa.Text(), nullable=False),
        sa.Column("latest", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("may_be_moved", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("barriers", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="scheduling_preferences_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("scheduling_preferences_pkey")),
    )
    op.create_table(
        "scheduling_request",
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
                "OPEN", "LETTER_DUE", "LETTER_SENT", "BOOKED", "CLOSED", name="status", native_enum=False, length=40
            ),
            nullable=False,
        ),
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("preferred_clinic_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("preferred_practitioner_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("earliest_date", sa.Text(), nullable=False),
        sa.Column("latest_date", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("based_on", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("referral_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("owner", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("owner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("step_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_basis", sa.Text(), nullable=False),
        sa.Column("next_action", sa.Text(), nullable=False),
        sa.Column("list_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("overdue_told", sa.Boolean(), nullable=False),
        sa.Column("attempts", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("letter_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("close_reason", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="scheduling_request_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("scheduling_request_pkey")),
        sa.UniqueConstraint("tenant_id", "referral_id", name="scheduling_request_referral_key"),
    )
    op.create_index(
        "scheduling_request_by_owner",
        "scheduling_request",
        ["tenant_id", "owner_id", "rank", "list_time", "id"],
        unique=False,
        postgresql_where=sa.text("due_time IS NOT NULL"),
    )
    op.create_index(
        "scheduling_request_by_patient",
        "scheduling_request",
        ["tenant_id", "patient_id", "rank", "list_time", "id"],
        unique=False,
    )
    op.create_index(
        "scheduling_request_next",
        "scheduling_request",
        ["tenant_id", "rank", "list_time", "id"],
        unique=False,
        postgresql_where=sa.text("due_time IS NOT NULL"),
    )
    op.create_index(
        "scheduling_request_overdue",
        "scheduling_request",
        ["due_time"],
        unique=False,
        postgresql_where=sa.text("due_time IS NOT NULL AND NOT overdue_told"),
    )
