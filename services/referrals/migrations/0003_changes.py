"""Lists of what changed since."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("referral_by_change", "referral", ["tenant_id", "update_time", "id"])
