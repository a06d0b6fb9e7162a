-- Audit rows are never touched again: what is not sealed yet stands in audit_open, a batch's seal in audit_seal.
--
-- The chain begins anew, so `care audit verify` of the release before has the last word on the old one: run it first.
-- Calls of that release go on meanwhile and afterwards. Its sealer only warns once the columns are gone; the triggers note
-- its rows, too, and the next release's sealer takes them.
--
-- Whoever holds the head seals alone: from here on no row changes from unsealed to sealed.
UPDATE audit_head SET seal = 0, hash = sha256('care audit') WHERE name = 'audit';

CREATE TABLE audit_open (
  id UUID NOT NULL
);

ALTER TABLE audit_open SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE TABLE audit_seal (
  seal BIGINT NOT NULL,
  rows BIGINT NOT NULL,
  ids UUID[] NOT NULL,
  digests BYTEA NOT NULL,
  hash BYTEA NOT NULL,
  CONSTRAINT audit_seal_pkey PRIMARY KEY (seal)
);

-- The many, while calls still write theirs.
INSERT INTO audit_open (id) SELECT id FROM audit WHERE seal IS NOT NULL;

-- Locks the audit until the end, with its triggers.
DROP FUNCTION audit_guard() CASCADE;

INSERT INTO audit_open (id) SELECT id FROM audit WHERE seal IS NULL;

ALTER TABLE audit DROP COLUMN seal, DROP COLUMN hash;

CREATE FUNCTION audit_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'audit rows and seals stay as they are' USING ERRCODE = 'restrict_violation';
END $$;

CREATE TRIGGER audit_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_guard();

CREATE TRIGGER audit_guard BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seal FOR EACH STATEMENT EXECUTE FUNCTION audit_guard();

CREATE FUNCTION audit_wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO audit_open (id) SELECT id FROM written;
  RETURN NULL;
END $$;

CREATE TRIGGER audit_wait AFTER INSERT ON audit REFERENCING NEW TABLE AS written FOR EACH STATEMENT EXECUTE FUNCTION audit_wait();
