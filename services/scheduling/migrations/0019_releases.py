"""When blocks of hours that are held back are released next."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("schedule", sa.Column("release_time", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "schedule_release", "schedule", ["release_time"], postgresql_where=sa.text("release_time IS NOT NULL")
    )
    op.execute(
        "UPDATE schedule SET release_time = clock_timestamp()"
        " WHERE jsonb_path_exists(weekly_hours, '$[*].release_hours ? (@ > 0)')"
    )
