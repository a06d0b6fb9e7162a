"""Patients who came without an appointment."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("appointment", sa.Column("walk_in", sa.Boolean(), server_default=sa.text("false"), nullable=False))
