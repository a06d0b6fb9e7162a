"""What releases have shipped with each role, so that what a later one ships reaches the roles that are stored."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "role", sa.Column("shipped", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False)
    )
    # What any role of the tenant has was known when its roles were written or changed: a role that lacks it was not given
    # it, or has had it taken away, and gets it by no later release.
    op.execute(
        "UPDATE role SET shipped = ARRAY(SELECT DISTINCT p FROM role other, unnest(other.permissions) AS p"
        " WHERE other.tenant_id = role.tenant_id ORDER BY p)"
    )
