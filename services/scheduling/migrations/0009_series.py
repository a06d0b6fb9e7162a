"""Series of visits."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "series",
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
            "status", sa.Enum("ACTIVE", "CANCELLED", name="seriesstatus", native_enum=False, length=40), nullable=False
        ),
        sa.Column("visit_type_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("practitioner_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("rule", sa.Text(), nullable=False),
        sa.Column("start", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("previous_series_id", sa.Uuid(as_uuid=False), nullable=True),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="series_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("series_pkey")),
    )
    op.create_index("series_by_patient", "series", ["tenant_id", "patient_id", "create_time", "id"], unique=False)
    op.add_column("appointment", sa.Column("series_id", sa.Uuid(as_uuid=False), nullable=True))
    op.add_column("appointment", sa.Column("series_number", sa.BigInteger(), nullable=True))
    op.add_column("appointment", sa.Column("series_start_time", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "appointment_by_series",
        "appointment",
        ["tenant_id", "series_id"],
        unique=False,
        postgresql_where=sa.text("series_id IS NOT NULL"),
    )
