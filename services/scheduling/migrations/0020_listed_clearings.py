"""Clearings by whose clinics they are at, latest first."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "clearing",
        sa.Column("clinic_ids", sa.ARRAY(sa.Uuid(as_uuid=False)), server_default=sa.text("'{}'"), nullable=False),
    )
    op.execute(
        "UPDATE clearing SET clinic_ids ="
        " ARRAY(SELECT (w.value->>0)::uuid FROM jsonb_array_elements(windows) AS w(value))"
    )
    op.create_index("clearing_by_time", "clearing", ["tenant_id", "create_time", "id"])
