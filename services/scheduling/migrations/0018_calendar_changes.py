"""The calendar notes where it changes."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_CHANGED = """
CREATE FUNCTION occupancy_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO occupancy_change (tenant_id, no, first, last)
  SELECT tenant_id, no, lower(during) & 4294967295, ((upper(during) - 1) & 4294967295) + 1 FROM changed
   WHERE ((upper(during) - 1) & 4294967295) > extract(epoch FROM clock_timestamp())::bigint - 172800;
  RETURN NULL;
END $$
"""
_CHANGED_BY = """
CREATE TRIGGER occupancy_{what} AFTER {what} ON occupancy REFERENCING {which} TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION occupancy_changed()
"""


def upgrade() -> None:
    op.create_table(
        "occupancy_change",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("xid", sa.BigInteger(), server_default=sa.text("pg_current_xact_id()::text::bigint"), nullable=False),
        sa.Column("no", sa.BigInteger(), nullable=False),
        sa.Column("first", sa.BigInteger(), nullable=False),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("occupancy_change_pkey")),
    )
    op.create_index("occupancy_change_by_transaction", "occupancy_change", ["tenant_id", "xid"])
    op.create_index("occupancy_change_by_time", "occupancy_change", ["time"])
    op.execute(
        "ALTER TABLE occupancy_change SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000)"
    )
    op.execute(_CHANGED.strip())
    for what, which in (("insert", "NEW"), ("update", "NEW"), ("delete", "OLD")):
        op.execute(_CHANGED_BY.strip().format(what=what, which=which))
