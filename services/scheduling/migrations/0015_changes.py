"""Lists of what changed since."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("appointment_by_change", "appointment", ["tenant_id", "update_time", "id"])
