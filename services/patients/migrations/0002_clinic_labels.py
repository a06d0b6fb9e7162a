"""Clinics' labels, for the tasks that are about them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "clinic_calendar",
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
