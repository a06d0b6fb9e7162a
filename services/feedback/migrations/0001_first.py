"""The first schema of feedback."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from chassis.migrations import chassis_schema

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in chassis_schema("0001"):
        op.get_bind().exec_driver_sql(statement)
    op.create_table(
        "questionnaire",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column(
            "status", sa.Enum("DRAFT", "ACTIVE", "RETIRED", name="status", native_enum=False, length=40), nullable=False
        ),
        sa.Column("title", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("items", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("scoring", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("crisis_help", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("after_visit", sa.Boolean(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("questionnaire_pkey")),
        sa.UniqueConstraint("tenant_id", "name", "number", name="questionnaire_version_key"),
    )
    op.create_index(
        "questionnaire_after_visit",
        "questionnaire",
        ["tenant_id", "create_time"],
        unique=False,
        postgresql_where=sa.text("after_visit AND status = 'ACTIVE'"),
    )
    op.create_table(
        "undone_visit",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("visit_version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "appointment_id", name=op.f("undone_visit_pkey")),
    )
    op.create_table(
        "questionnaire_response",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("invitation_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("questionnaire_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum("COMPLETED", "AMENDED", "ENTERED_IN_ERROR", name="status", native_enum=False, length=40),
            nullable=False,
        ),
        sa.Column("answers", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("score", sa.Integer(), nullable=True),
        sa.Column("band", sa.Text(), nullable=False),
        sa.Column("bad", sa.Boolean(), nullable=False),
        sa.Column("critical_link_ids", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("language", sa.Text(), nullable=False),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="questionnaire_response_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("questionnaire_response_pkey")),
        sa.UniqueConstraint("tenant_id", "invitation_id", name="questionnaire_response_invitation_key"),
    )
    op.create_index(
        "questionnaire_response_by_patient",
        "questionnaire_response",
        ["tenant_id", "patient_id", "create_time", "id"],
        unique=False,
    )
    op.create_index(
        "questionnaire_response_by_time", "questionnaire_response", ["tenant_id", "create_time", "id"], unique=False
    )
    op.create_table(
        "survey_invitation",
        sa.Column("tenant_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column(
            "create_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column(
            "update_time", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("patient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("recipient", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("recipient_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("questionnaire_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("appointment_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column("clinic_id", sa.Uuid(as_uuid=False), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "PLANNED", "INVITED", "COMPLETED", "EXPIRED", "REVOKED", name="status", native_enum=False, length=40
            ),
            nullable=False,
        ),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("policy_version", sa.BigInteger(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=True),
        sa.Column("security_labels", postgresql.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("history", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["record_subject.tenant_id", "record_subject.patient_id"],
            name="survey_invitation_subject_fkey",
        ),
        sa.PrimaryKeyConstraint("tenant_id", "id", name=op.f("survey_invitation_pkey")),
        sa.UniqueConstraint("tenant_id", "appointment_id", name="survey_invitation_visit_key"),
        sa.UniqueConstraint("token_hash", name="survey_invitation_token_key"),
    )
    op.create_index(
        "survey_invitation_by_patient",
        "survey_invitation",
        ["tenant_id", "patient_id", "create_time", "id"],
        unique=False,
    )
    op.create_index(
        "survey_invitation_by_recipient", "survey_invitation", ["tenant_id", "recipient_id", "due_time"], unique=False
    )
    op.create_index("survey_invitation_by_time", "survey_invitation", ["tenant_id", "create_time", "id"], unique=False)
    op.create_index(
        "survey_invitation_due",
        "survey_invitation",
        ["due_time"],
        unique=False,
        postgresql_where=sa.text("status = 'PLANNED'"),
    )
    op.create_index(
        "survey_invitation_ending",
        "survey_invitation",
        ["expire_time"],
        unique=False,
        postgresql_where=sa.text("status = 'INVITED'"),
    )


def downgrade() -> None:
    raise RuntimeError("There is nothing before the first schema: drop the database instead.")
