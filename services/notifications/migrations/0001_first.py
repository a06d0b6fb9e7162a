"""The first schema of notifications."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from chassis.migrations import chassis_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in chassis_schema("0001"):
        op.get_bind().exec_driver_sql(statement)
    op.create_table(
        "clinic",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("discreet_name", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("address", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("phone", sa.Text(), nullable=False),
        sa.Column("directions", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("clinic_pkey")),
    )
    op.create_table(
        "visit_type",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("discreet_name", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("preparation", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("visit_type_pkey")),
    )
    op.create_table(
        "appointment",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("schedule_version", sa.BigInteger(), nullable=False),
        sa.Column("planned_version", sa.BigInteger(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="appointment_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("appointment_pkey")),
    )
    op.create_table(
        "message",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("about", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("about_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "PREPARATION",
                "IN_PROGRESS",
                "NOT_DONE",
                "ON_HOLD",
                "STOPPED",
                "COMPLETED",
                "UNKNOWN",
                name="messagestatus",
                native_enum=False,
                length=40,
            ),
            nullable=False,
        ),
        sa.Column("next_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sent_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("spent", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("wished_language", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("consent_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("consent_version", sa.BigInteger(), nullable=False),
        sa.Column("local_time", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("lease_token", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("lease_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("recipient", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("recipient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("schedule_version", sa.BigInteger(), nullable=False),
        sa.Column("offset", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("channels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("own_action_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("open_from", sa.Text(), nullable=False),
        sa.Column("open_until", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.BigInteger(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="message_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("message_pkey")),
        sa.UniqueConstraint(
            "tenant_id", "about_id", "kind", "schedule_version", "offset", "recipient_id", name="message_once_key"
        ),
    )
    op.create_index("message_by_patient", "message", ["tenant_id", "patient_id", "create_time", "id"], unique=False)
    op.create_index("message_by_time", "message", ["tenant_id", "create_time", "id"], unique=False)
    op.create_index(
        "message_in_progress",
        "message",
        ["lease_time"],
        unique=False,
        postgresql_where=sa.text("status = 'IN_PROGRESS'"),
    )
    op.create_index(
        "message_waiting",
        "message",
        ["next_time"],
        unique=False,
        postgresql_where=sa.text("status IN ('PREPARATION', 'ON_HOLD')"),
    )
    op.create_table(
        "reminder",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum("ACTIVE", "COMPLETED", "REVOKED", name="reminderstatus", native_enum=False, length=40),
            nullable=False,
        ),
        sa.Column("message_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("recipient", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("recipient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("schedule_version", sa.BigInteger(), nullable=False),
        sa.Column("offset", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("channels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("own_action_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("open_from", sa.Text(), nullable=False),
        sa.Column("open_until", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.BigInteger(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="reminder_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("reminder_pkey")),
        sa.UniqueConstraint(
            "tenant_id",
            "appointment_id",
            "schedule_version",
            "offset",
            "channel",
            "recipient_id",
            name="reminder_ledger_key",
        ),
    )
    op.create_index("reminder_by_patient", "reminder", ["tenant_id", "patient_id", "due_time", "id"], unique=False)
    op.create_index(
        "reminder_due", "reminder", ["due_time"], unique=False, postgresql_where=sa.text("status = 'ACTIVE'")
    )
    op.create_table(
        "attempt",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("message_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=False),
        sa.Column("provider_message_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "message_id"], ["message.tenant_id", "message.id"], name="attempt_message_fkey"
        ),
        sa.PrimaryKeyConstraint("tenant_id", "message_id", "number", name=op.f("attempt_pkey")),
    )


def downgrade() -> None:
    raise RuntimeError("There is nothing before the first schema: drop the database instead.")
