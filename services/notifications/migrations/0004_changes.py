"""Lists of what changed since."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("message_by_change", "message", ["tenant_id", "update_time", "id"])
