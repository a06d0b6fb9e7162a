"""A visit may make up for one that was cancelled or missed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("appointment", sa.Column("previous_appointment_id", sa.Uuid(as_uuid=False), nullable=True))
