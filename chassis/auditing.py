"""The audit's seals: batches of rows are chained by hash after the fact, so that a changed, removed or forked one shows."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from care.audit.v1 import audit_pb2
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey
from sqlalchemy import Text, Uuid, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chassis.call import Call
from chassis.errors import Invalid
from chassis.lease import Lease
from chassis.settings import Settings
from chassis.telemetry import Telemetry
from chassis.wire import to_proto

GENESIS = hashlib.sha256(b"care audit").digest()
_BATCH = 1000
_REMOVED = bytes(32)
# The digest of a row: over every column that tells something, times in microseconds as PostgreSQL keeps them. Zeros where
# there is no row any more.
_DIGEST = """
CASE WHEN audit.id IS NULL THEN decode(repeat('00', 32), 'hex') ELSE sha256(convert_to(json_build_array(
  audit.id, audit.tenant_id, CASE WHEN isfinite(audit.time) THEN floor(extract(epoch FROM audit.time) * 1000000)::bigint END,
  audit.actor, audit.on_behalf_of, audit.method, audit.permission, audit.purpose, audit.subject_ids, audit.outcome,
  audit.trace_id)::text, 'UTF8')) END
"""
_WAITING = text("SELECT 1 FROM audit_open LIMIT 1")
# By itself, so that the next statement sees what whoever held the head before has done.
_LOCK = text("SELECT 1 FROM audit_head WHERE name = 'audit' FOR UPDATE")
_SEAL = text(f"""
WITH taken AS (
  DELETE FROM audit_open WHERE ctid = ANY (ARRAY(SELECT ctid FROM audit_open LIMIT {_BATCH})) RETURNING id
), batch AS (
  SELECT array_agg(taken.id ORDER BY taken.id) AS ids, string_agg(uuid_send(taken.id), ''::bytea ORDER BY taken.id) AS plain,
    string_agg({_DIGEST}, ''::bytea ORDER BY taken.id) AS digests, count(*) AS rows, count(*) - count(audit.id) AS removed
    FROM taken LEFT JOIN audit ON audit.id = taken.id
), sealed AS (
  INSERT INTO audit_seal (seal, rows, ids, digests, hash)
  SELECT head.seal + 1, coalesce(last.rows, 0) + batch.rows, batch.ids, batch.digests,
    sha256(head.hash || int8send(head.seal + 1) || batch.plain || batch.digests)
    FROM batch, audit_head AS head LEFT JOIN audit_seal AS last ON last.seal = head.seal
   WHERE head.name = 'audit' AND batch.rows > 0
  RETURNING seal, rows, hash
), moved AS (
  UPDATE audit_head SET seal = sealed.seal, hash = sealed.hash FROM sealed WHERE audit_head.name = 'audit'
)
SELECT sealed.seal, sealed.rows, sealed.hash, batch.rows AS taken, batch.removed FROM sealed, batch
""")
_SEALS = text(f"""
SELECT one.seal, one.rows, one.digests, one.hash, there.ids, there.digests AS found, there.removed
  FROM (SELECT seal, rows, ids, digests, hash FROM audit_seal WHERE seal > :after ORDER BY seal LIMIT 10) AS one,
    LATERAL (
      SELECT string_agg(uuid_send(named.id), ''::bytea ORDER BY named.place) AS ids,
        string_agg({_DIGEST}, ''::bytea ORDER BY named.place) AS digests, count(*) - count(audit.id) AS removed
        FROM unnest(one.ids) WITH ORDINALITY AS named (id, place) LEFT JOIN audit ON audit.id = named.id
    ) AS there
 ORDER BY one.seal
""")
_REST = text("""
SELECT (SELECT count(*) FROM audit_open) AS unsealed,
  (SELECT id FROM audit_open WHERE NOT EXISTS (SELECT FROM audit WHERE audit.id = audit_open.id) LIMIT 1) AS removed,
  (SELECT count(*) FROM audit WHERE NOT EXISTS (SELECT FROM audit_open WHERE audit_open.id = audit.id) AND NOT EXISTS (
    SELECT FROM audit_seal, unnest(ids) AS sealed (id) WHERE sealed.id = audit.id)) AS bare
""")


def link(previous: bytes, seal: int, ids: bytes, digests: bytes) -> bytes:
    """The hash of a seal: 16 bytes an id, 32 bytes a row's digest, in one order."""
    return hashlib.sha256(previous + seal.to_bytes(8, "big") + ids + digests).digest()


class Sealer:
    """Seals batches of rows at most a second apart, and signs the head into a file outside the database.

    It takes what `audit_open` holds, never what lies behind a cursor: rows commit out of order. A head lock inside request
    transactions would cost two thirds of the bookings, and without any lock a chain forks. Rows stay untouched: a seal
    in each of them would give every index a second entry.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings, telemetry: Telemetry) -> None:
        self._engine = engine
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lease = Lease(engine, "audit", ttl=settings.relay_lease)
        self._checkpoints = settings.audit_checkpoint_file
        self._key_file = settings.service_key_file
        self._service = telemetry.service
        self._log = telemetry.log
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to seal."""
        self._task = asyncio.create_task(self._run(), name="sealer")

    async def stop(self) -> None:
        """End; what is not sealed yet is sealed after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._lease.release(), 2)

    async def _run(self) -> None:
        while True:
            try:
                while await self._lease.hold() and await self._waits() and await self.seal() == _BATCH:
                    pass
            except Exception as error:
                self._log.warning("audit not sealed, trying again", error=type(error).__name__)
            await asyncio.sleep(1)

    async def _waits(self) -> bool:
        """Whether there is something to seal: one statement instead of a transaction in each idle second."""
        async with self._autocommit.connect() as connection:
            return (await connection.execute(_WAITING)).first() is not None

    async def seal(self) -> int:
        """Seal one batch; answers how many rows."""
        async with self._engine.begin() as connection:
            (await connection.execute(_LOCK)).one()
            sealed = (await connection.execute(_SEAL)).first()
        if sealed is None:
            return 0
        if sealed.removed:
            self._log.error("audit rows were removed before they were sealed", rows=sealed.removed)
        self._checkpoint(sealed.seal, sealed.rows, sealed.hash)
        taken: int = sealed.taken
        return taken

    def _checkpoint(self, seal: int, rows: int, head: bytes) -> None:
        if self._checkpoints is None or self._key_file is None:
            return
        key = OKPKey.import_key(json.loads(self._key_file.read_text()))
        claim = json.dumps({"service": self._service, "seal": seal, "rows": rows, "hash": head.hex()}).encode()
        header = {"alg": "Ed25519", "kid": self._service}
        signed = jws.serialize_compact(header, claim, key, algorithms=["Ed25519"])
        with self._checkpoints.open("a") as file:
            file.write(signed + "\n")


class Verdict(NamedTuple):
    """What a check of the chain found: sealed and unsealed rows, checkpoints met. `broken` says what is wrong first."""

    rows: int
    unsealed: int
    checkpoints: int
    broken: str = ""


async def verify(engine: AsyncEngine, checkpoints: Path | None = None, keys: KeySet | None = None) -> Verdict:
    """Walk the chain from its beginning and compare it with the rows and with the signed checkpoints.

    The last statement reads all ids of the audit at once: minutes, where there are a hundred million.
    """
    wanted: dict[int, tuple[int, bytes]] = {}
    line = 1
    try:
        for signed in _read_checkpoints(checkpoints, keys):
            if signed is not None and wanted.setdefault(signed[0], signed[1:]) != signed[1:]:
                return Verdict(0, 0, 0, f"two chains were signed at {signed[0]}: it was forked")
            line += 1
    except (JoseError, ValueError, KeyError, TypeError):
        return Verdict(0, 0, 0, f"checkpoint {line} is not one that the service signed")
    # One snapshot, taken after the file was read: what is sealed meanwhile is no gap.
    async with engine.execution_options(isolation_level="REPEATABLE READ").connect() as connection:
        seal, rows, met, previous = 0, 0, 0, GENESIS
        while seals := (await connection.execute(_SEALS, {"after": seal})).all():
            for one in seals:
                if broken := _fault(one, seal, rows, previous):
                    return Verdict(rows, 0, met, broken)
                seal, rows, previous = one.seal, one.rows, one.hash
                if seal in wanted:
                    if wanted.pop(seal) != (rows, previous):
                        return Verdict(rows, 0, met, f"the chain up to {seal} is another than the one that was signed")
                    met += 1
        if wanted:
            return Verdict(rows, 0, met, f"the chain ends at {seal}, signed was {max(wanted)}")
        unsealed, broken = await _end(connection, seal, previous)
        return Verdict(rows, unsealed, met, broken)


def _fault(one: Any, seal: int, rows: int, previous: bytes) -> str:
    """What is wrong with the seal that follows `seal`, "" for nothing."""
    if one.seal != seal + 1:
        return f"seal {seal + 1} is missing"
    ids, found = one.ids or b"", one.found or b""
    count = len(ids) // 16
    # Without the lengths, what belongs to the ids could be taken for digests.
    whole = len(one.digests) == len(found) == 32 * count and one.rows == rows + count
    if not whole or link(previous, one.seal, ids, one.digests) != one.hash:
        return f"seal {one.seal} was changed"
    if one.removed or found != one.digests:
        for place in range(count):
            here = slice(32 * place, 32 * place + 32)
            if found[here] == _REMOVED or found[here] != one.digests[here]:
                row = UUID(bytes=ids[16 * place : 16 * place + 16])
                return f"row {row} is missing" if found[here] == _REMOVED else f"row {row} was changed"
    return ""


async def _end(connection: AsyncConnection, seal: int, previous: bytes) -> tuple[int, str]:
    """How many rows are not sealed yet, and what is wrong behind the last seal, "" for nothing."""
    head = (await connection.execute(text("SELECT seal, hash FROM audit_head WHERE name = 'audit'"))).first()
    rest = (await connection.execute(_REST)).one()
    broken = ""
    if head is None or head.seal < seal or (head.seal == seal and head.hash != previous):
        broken = "the head is not the chain's"
    elif head.seal > seal:
        broken = f"seal {seal + 1} is missing"
    elif rest.removed is not None:
        broken = f"row {rest.removed} is missing"
    elif rest.bare:
        broken = f"{rest.bare} rows stand under no seal"
    return rest.unsealed, broken


def _read_checkpoints(file: Path | None, keys: KeySet | None) -> Iterator[tuple[int, int, bytes] | None]:
    """Seal, rows and hash of each line; None for one that was signed when each row had a seal of its own."""
    if file is None or keys is None or not file.exists():
        return
    for line in file.read_text().split():
        signed = jws.deserialize_compact(line, keys, algorithms=["Ed25519"])
        claim = json.loads(signed.payload or b"")
        if signed.headers().get("kid") != claim["service"]:
            raise ValueError("signed by another service")
        yield (claim["seal"], claim["rows"], bytes.fromhex(claim["hash"])) if "rows" in claim else None


_ACCESSES = text("""
SELECT id, time, actor, on_behalf_of, method, permission, purpose, outcome FROM audit
 WHERE tenant_id = :tenant AND subject_ids @> ARRAY[:patient]::uuid[]
   AND (:before = '' OR id < CAST(nullif(:before, '') AS uuid))
 ORDER BY id DESC LIMIT :most
""").bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("patient", type_=Uuid(as_uuid=False)),
    bindparam("before", type_=Text),
)


class AuditServicer:
    """Who saw a record, from this service's own audit."""

    async def ListAccesses(self, request: audit_pb2.ListAccessesRequest, call: Call) -> audit_pb2.ListAccessesResponse:
        await call.subject(request.patient_id)
        signer = call.runtime.page_signer
        before = ""
        if request.page_token:
            opened = signer.open(request.page_token)
            if not isinstance(opened, list) or opened[0] != request.patient_id:
                raise Invalid("PAGE_TOKEN_INVALID", "The page token is not of this query.", field="page_token")
            before = opened[1]
        size = min(max(request.page_size or 50, 1), 200)
        rows: Any = (
            await call.db.execute(
                _ACCESSES,
                {"tenant": call.tenant_id, "patient": request.patient_id, "before": before, "most": size + 1},
            )
        ).all()
        answer = audit_pb2.ListAccessesResponse()
        for row in rows[:size]:
            answer.accesses.append(to_proto(row, audit_pb2.Access, service=call.runtime.service))
        if len(rows) > size:
            answer.next_page_token = signer.sign([request.patient_id, str(rows[size - 1].id)])
        return answer
