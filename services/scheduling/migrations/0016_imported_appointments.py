"""Appointments that another system had before, each by what it is called there."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "appointment_identifier",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="appointment_identifier_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("appointment_identifier_pkey")),
        sa.UniqueConstraint("tenant_id", "system", "value", name="appointment_identifier_key"),
    )
    op.create_index("appointment_identifier_by_patient", "appointment_identifier", ["tenant_id", "patient_id"])
    op.add_column(
        "appointment",
        sa.Column(
            "identifiers", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
    )
    op.add_column("appointment", sa.Column("source_system", sa.Text(), server_default=sa.text("''"), nullable=False))
