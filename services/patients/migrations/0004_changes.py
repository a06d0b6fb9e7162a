"""Lists of what changed since."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("patient_by_change", "patient", ["tenant_id", "update_time", "id"])
    op.create_index("task_by_change", "task", ["tenant_id", "update_time", "id"])
