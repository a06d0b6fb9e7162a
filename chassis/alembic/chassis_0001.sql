-- What the chassis brings to every service's database, first version. Frozen: changes come as further files.
CREATE TABLE access_heartbeat (
  partition INTEGER NOT NULL,
  time TIMESTAMP WITH TIME ZONE NOT NULL,
  CONSTRAINT access_heartbeat_pkey PRIMARY KEY (partition)
);

CREATE TABLE audit (
  id UUID NOT NULL,
  tenant_id UUID NOT NULL,
  time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  actor TEXT NOT NULL,
  on_behalf_of TEXT DEFAULT '' NOT NULL,
  method TEXT NOT NULL,
  permission TEXT DEFAULT '' NOT NULL,
  purpose TEXT DEFAULT '' NOT NULL,
  subject_ids UUID[] DEFAULT '{}' NOT NULL,
  outcome TEXT NOT NULL,
  trace_id TEXT DEFAULT '' NOT NULL,
  seal BIGINT,
  hash BYTEA,
  CONSTRAINT audit_pkey PRIMARY KEY (id),
  CONSTRAINT audit_seal_key UNIQUE (seal)
);

CREATE INDEX audit_by_subject ON audit USING gin (subject_ids);

CREATE INDEX audit_unsealed ON audit (id) WHERE seal IS NULL;

CREATE TABLE audit_head (
  name TEXT NOT NULL,
  seal BIGINT NOT NULL,
  hash BYTEA NOT NULL,
  CONSTRAINT audit_head_pkey PRIMARY KEY (name)
);

CREATE TABLE idempotency_key (
  tenant_id UUID NOT NULL,
  actor TEXT NOT NULL,
  method TEXT NOT NULL,
  request_id TEXT NOT NULL,
  body_hash BYTEA NOT NULL,
  response BYTEA,
  subject_ids UUID[] DEFAULT '{}' NOT NULL,
  create_time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  CONSTRAINT idempotency_key_pkey PRIMARY KEY (tenant_id, actor, method, request_id)
);

CREATE INDEX idempotency_key_by_time ON idempotency_key (create_time);

CREATE TABLE inbox (
  group_name TEXT NOT NULL,
  event_id UUID NOT NULL,
  type TEXT NOT NULL,
  time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  CONSTRAINT inbox_pkey PRIMARY KEY (group_name, event_id)
);

CREATE INDEX inbox_by_time ON inbox (time);

CREATE TABLE lease (
  name TEXT NOT NULL,
  owner UUID NOT NULL,
  epoch BIGINT NOT NULL,
  until TIMESTAMP WITH TIME ZONE NOT NULL,
  CONSTRAINT lease_pkey PRIMARY KEY (name)
);

CREATE TABLE outbox (
  id BIGINT GENERATED ALWAYS AS IDENTITY,
  topic TEXT NOT NULL,
  key TEXT NOT NULL,
  value BYTEA NOT NULL,
  traceparent TEXT DEFAULT '' NOT NULL,
  create_time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  CONSTRAINT outbox_pkey PRIMARY KEY (id)
);

CREATE TABLE outbox_aside (
  topic TEXT NOT NULL,
  key TEXT NOT NULL,
  reason TEXT NOT NULL,
  outbox_id BIGINT NOT NULL,
  time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  CONSTRAINT outbox_aside_pkey PRIMARY KEY (topic, key)
);

CREATE TABLE policy (
  tenant_id UUID NOT NULL,
  key TEXT NOT NULL,
  scope TEXT NOT NULL,
  scope_id UUID NOT NULL,
  version BIGINT NOT NULL,
  effective_time TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
  settings JSONB NOT NULL,
  CONSTRAINT policy_pkey PRIMARY KEY (tenant_id, key, scope, scope_id, version)
);

CREATE TABLE principal (
  tenant_id UUID NOT NULL,
  issuer TEXT NOT NULL,
  subject TEXT NOT NULL,
  id UUID NOT NULL,
  kind TEXT NOT NULL,
  principal_id UUID NOT NULL,
  roles TEXT[] NOT NULL,
  group_ids UUID[] NOT NULL,
  clearances TEXT[] NOT NULL,
  active BOOLEAN NOT NULL,
  version BIGINT NOT NULL,
  CONSTRAINT principal_pkey PRIMARY KEY (tenant_id, issuer, subject),
  CONSTRAINT principal_id_key UNIQUE (tenant_id, id)
);

CREATE TABLE record_subject (
  tenant_id UUID NOT NULL,
  patient_id UUID NOT NULL,
  access_version BIGINT NOT NULL,
  grantee_ids UUID[] NOT NULL,
  timed_grants JSONB DEFAULT '[]' NOT NULL,
  security_labels TEXT[] DEFAULT '{}' NOT NULL,
  survivor_id UUID,
  CONSTRAINT record_subject_pkey PRIMARY KEY (tenant_id, patient_id)
);

CREATE TABLE role_permissions (
  tenant_id UUID NOT NULL,
  name TEXT NOT NULL,
  permissions TEXT[] NOT NULL,
  version BIGINT NOT NULL,
  CONSTRAINT role_permissions_pkey PRIMARY KEY (tenant_id, name)
);

ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE FUNCTION audit_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' AND OLD.seal IS NULL AND NEW.seal IS NOT NULL
     AND to_jsonb(OLD) - 'seal' - 'hash' = to_jsonb(NEW) - 'seal' - 'hash' THEN
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'audit rows stay as they are' USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER audit_guard BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_guard();

CREATE TRIGGER audit_guard_all BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_guard();

INSERT INTO audit_head (name, seal, hash) VALUES ('audit', 0, decode('83219a75c1b6128b9d133035c7291482aace506b844a535ed9ceb51f6fd580b3', 'hex'));
