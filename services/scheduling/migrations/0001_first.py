"""The first schema of scheduling."""

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
        "bookable",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("ref_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("no", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "ref_id", name=op.f("bookable_pkey")),
        sa.UniqueConstraint("no", name=op.f("bookable_no_key")),
    )
    op.create_table(
        "clinic",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "identifiers", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("discreet_name", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("address", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("telecom", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("holiday_region", sa.Text(), nullable=False),
        sa.Column("closed_dates", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("directions", sa.Text(), nullable=False),
        sa.Column(
            "specialties", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("source_system", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("clinic_pkey")),
    )
    op.create_index("clinic_by_name", "clinic", ["tenant_id", "name", "id"], unique=False)
    op.create_table(
        "deceased_patient",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "patient_id", name=op.f("deceased_patient_pkey")),
    )
    op.create_table(
        "directory_identifier",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("owner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("directory_identifier_pkey")),
        sa.UniqueConstraint("tenant_id", "system", "value", name="directory_identifier_key"),
    )
    op.create_index(op.f("directory_identifier_owner_id_ix"), "directory_identifier", ["owner_id"], unique=False)
    op.create_table(
        "occupancy",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("holder_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("no", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("lane", sa.BigInteger(), nullable=False),
        sa.Column("during", postgresql.INT8RANGE(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=True),
        postgresql.ExcludeConstraint((sa.column("during"), "&&"), using="gist", name="occupancy_taken"),
        sa.CheckConstraint(
            "no BETWEEN 1 AND 536870910 AND lane BETWEEN 0 AND 3 AND NOT isempty(during) AND NOT lower_inf(during) AND NOT upper_inf(during) AND lower(during) >= (((no) << 34) + (((lane)::bigint) << 32)) AND upper(during) <= (((no) << 34) + (((lane)::bigint) << 32)) + 4294967296",
            name=op.f("occupancy_within_check"),
        ),
        sa.PrimaryKeyConstraint("tenant_id", "holder_id", "no", name=op.f("occupancy_pkey")),
    )
    op.create_table(
        "practitioner",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "identifiers", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("name", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("languages", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("licensed_states", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("roles", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("gender", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("source_system", sa.Text(), nullable=False),
        sa.Column("family_name", sa.Text(), nullable=False),
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("practitioner_pkey")),
    )
    op.create_index("practitioner_by_clinic", "practitioner", ["clinic_ids"], unique=False, postgresql_using="gin")
    op.create_index("practitioner_by_name", "practitioner", ["tenant_id", "family_name", "id"], unique=False)
    op.create_table(
        "resource",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("resource_pkey")),
    )
    op.create_index("resource_by_clinic", "resource", ["tenant_id", "clinic_id", "kind"], unique=False)
    op.create_table(
        "schedule",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("practitioner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "weekly_hours", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column(
            "exceptions", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("schedule_pkey")),
        sa.UniqueConstraint("tenant_id", "practitioner_id", "clinic_id", name="schedule_practitioner_key"),
    )
    op.create_index("schedule_by_clinic", "schedule", ["tenant_id", "clinic_id"], unique=False)
    op.create_table(
        "visit_type",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("discreet_name", sa.Text(), nullable=False),
        sa.Column("duration_minutes", sa.BigInteger(), nullable=False),
        sa.Column("buffer_before_minutes", sa.BigInteger(), nullable=False),
        sa.Column("buffer_after_minutes", sa.BigInteger(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("resource_kinds", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("specialty", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("start_grid_minutes", sa.BigInteger(), nullable=False),
        sa.Column("minimum_notice_minutes", sa.BigInteger(), nullable=False),
        sa.Column("late_cancel_hours", sa.BigInteger(), nullable=False),
        sa.Column("overbooking_cap", sa.BigInteger(), nullable=False),
        sa.Column("preparation", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("visit_type_pkey")),
        sa.UniqueConstraint("tenant_id", "code", name="visit_type_code_key"),
    )
    op.create_table(
        "appointment",
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
                "PROPOSED",
                "PENDING",
                "BOOKED",
                "ARRIVED",
                "FULFILLED",
                "CANCELLED",
                "NOSHOW",
                "ENTERED_IN_ERROR",
                "CHECKED_IN",
                "WAITLIST",
                name="status",
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
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("participants", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("based_on", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("hold_expire_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("schedule_version", sa.BigInteger(), nullable=False),
        sa.Column("cancelation_reason", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("late_cancel", sa.Boolean(), nullable=False),
        sa.Column("late_cancel_hours", sa.BigInteger(), nullable=False),
        sa.Column("confirm_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("overbooking", sa.BigInteger(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="appointment_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("appointment_pkey")),
    )
    op.create_index(
        "appointment_by_clinic", "appointment", ["tenant_id", "clinic_id", "start_time", "id"], unique=False
    )
    op.create_index(
        "appointment_by_patient", "appointment", ["tenant_id", "patient_id", "start_time", "id"], unique=False
    )
    op.create_index(
        "appointment_by_practitioner", "appointment", ["tenant_id", "practitioner_id", "start_time", "id"], unique=False
    )
    op.create_index(
        "appointment_held",
        "appointment",
        ["hold_expire_time"],
        unique=False,
        postgresql_where=sa.text("status = 'PENDING'"),
    )


def downgrade() -> None:
    raise RuntimeError("There is nothing before the first schema: drop the database instead.")
