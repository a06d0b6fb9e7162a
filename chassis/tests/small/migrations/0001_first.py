"""The first schema of the small service: what the chassis brings, and the models' own tables."""

from alembic import op

from chassis.migrations import chassis_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in chassis_schema("0001"):
        op.get_bind().exec_driver_sql(statement)
    metadata = op.get_context().opts["target_metadata"]
    own = [metadata.tables[name] for name in ("pool", "consent", "task")]
    metadata.create_all(op.get_bind(), tables=own)


def downgrade() -> None:
    raise RuntimeError("There is nothing before the first schema.")
