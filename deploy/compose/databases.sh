#!/bin/sh
# Runs once in the fresh PostgreSQL: a database and a role for each service, none of which can see another's.
set -eu
for service in patients scheduling referrals notifications feedback; do
  psql -v ON_ERROR_STOP=1 -v service="$service" -v password="$CARE_DATABASE_PASSWORD" --username "$POSTGRES_USER" <<'SQL'
CREATE ROLE :"service" LOGIN PASSWORD :'password';
CREATE DATABASE :"service" OWNER :"service";
REVOKE CONNECT ON DATABASE :"service" FROM PUBLIC;
SQL
done
