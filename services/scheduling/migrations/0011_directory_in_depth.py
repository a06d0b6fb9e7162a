"""What visits need and who can have them, resources with hours, where clinics are, and what quotas count."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_LIST = {"server_default": sa.text("'[]'"), "nullable": False}
_ARRAY = {"server_default": sa.text("'{}'"), "nullable": False}


def upgrade() -> None:
    op.add_column("clinic", sa.Column("position", postgresql.JSONB(none_as_null=True), nullable=True))
    for column in (
        sa.Column("weekly_hours", postgresql.JSONB(), **_LIST),
        sa.Column("exceptions", postgresql.JSONB(), **_LIST),
        sa.Column("languages", postgresql.ARRAY(sa.Text()), **_ARRAY),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
    ):
        op.add_column("resource", column)
    for column in (
        sa.Column("requirements", postgresql.JSONB(), **_LIST),
        sa.Column("lock_out_minutes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("self_booking", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column("self_rescheduling", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column("self_cancelling", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column("eligibility", postgresql.JSONB(none_as_null=True), nullable=True),
        sa.Column("licence_required", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("needed_kinds", postgresql.ARRAY(sa.Text()), **_ARRAY),
        sa.Column("needed_ids", postgresql.ARRAY(sa.Uuid(as_uuid=False)), **_ARRAY),
    ):
        op.add_column("visit_type", column)
    for column in (
        sa.Column("interpreter_language", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("new_patient", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    ):
        op.add_column("appointment", column)
