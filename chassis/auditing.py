"""The audit's seal: rows are chained by hash after the fact, so that a changed, removed or forked one shows."""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from care.audit.v1 import audit_pb2
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey
from sqlalchemy import ARRAY, BigInteger, LargeBinary, Text, Uuid, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from chassis.call import Call
from chassis.errors import Invalid
from chassis.lease import Lease
from chassis.settings import Settings
from chassis.telemetry import Telemetry
from chassis.wire import to_proto

GENESIS = hashlib.sha256(b"care audit").digest()
_BATCH = 1000
# The canonical bytes of a row: every column that tells something, times in microseconds as PostgreSQL keeps them.
_ROW = """
jsonb_build_array(id, tenant_id, floor(extract(epoch FROM time) * 1000000)::bigint, actor, on_behalf_of, method,
  permission, purpose, subject_ids, outcome, trace_id)::text
"""
_UNSEALED = text(f"SELECT id, {_ROW} AS body FROM audit WHERE seal IS NULL ORDER BY id LIMIT {_BATCH}")
_WAITING = text("SELECT 1 FROM audit WHERE seal IS NULL LIMIT 1")
_SEALED = text(
    f"SELECT seal, hash, {_ROW} AS body FROM audit WHERE seal > :after AND seal IS NOT NULL ORDER BY seal LIMIT {_BATCH}"
)
_HEAD = text("SELECT seal, hash FROM audit_head WHERE name = 'audit' FOR UPDATE")
_SEAL = text(
    "UPDATE audit SET seal = new.seal, hash = new.hash"
    " FROM unnest(:ids, :seals, :hashes) AS new(id, seal, hash) WHERE audit.id = new.id AND audit.seal IS NULL"
).bindparams(
    bindparam("ids", type_=ARRAY(Uuid(as_uuid=False))),
    bindparam("seals", type_=ARRAY(BigInteger)),
    bindparam("hashes", type_=ARRAY(LargeBinary)),
)
# Run as part of the schema: what is written stays, but for the seal, once.
GUARD = (
    """
CREATE FUNCTION audit_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'UPDATE' AND OLD.seal IS NULL AND NEW.seal IS NOT NULL
     AND to_jsonb(OLD) - 'seal' - 'hash' = to_jsonb(NEW) - 'seal' - 'hash' THEN
    RETURN NEW;
  END IF;
  RAISE EXCEPTION 'audit rows stay as they are' USING ERRCODE = 'restrict_violation';
END $$
""",
    "CREATE TRIGGER audit_guard BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_guard()",
    "CREATE TRIGGER audit_guard_all BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_guard()",
    "INSERT INTO audit_head (name, seal, hash) VALUES ('audit', 0, decode('" + GENESIS.hex() + "', 'hex'))",
)


def link(previous: bytes, seal: int, body: str) -> bytes:
    """The hash of a row in the chain."""
    return hashlib.sha256(previous + seal.to_bytes(8, "big") + body.encode()).digest()


class Sealer:
    """Chains unsealed rows, in batches at most a second apart, and signs the head into a file outside the database.

    It takes what is unsealed, never what lies behind a cursor: rows commit out of order. A head lock inside request
    transactions would cost two thirds of the bookings, and without any lock a chain forks.
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
            head = (await connection.execute(_HEAD)).one()
            rows = (await connection.execute(_UNSEALED)).all()
            if not rows:
                return 0
            seal, previous = head.seal, bytes(head.hash)
            seals, hashes = [], []
            for row in rows:
                seal += 1
                previous = link(previous, seal, row.body)
                seals.append(seal)
                hashes.append(previous)
            await connection.execute(_SEAL, {"ids": [str(row.id) for row in rows], "seals": seals, "hashes": hashes})
            await connection.execute(
                text("UPDATE audit_head SET seal = :seal, hash = :hash WHERE name = 'audit'"),
                {"seal": seal, "hash": previous},
            )
        self._checkpoint(seal, previous)
        return len(rows)

    def _checkpoint(self, seal: int, head: bytes) -> None:
        if self._checkpoints is None or self._key_file is None:
            return
        key = OKPKey.import_key(json.loads(self._key_file.read_text()))
        claim = json.dumps({"service": self._service, "seal": seal, "hash": head.hex()}).encode()
        header = {"alg": "Ed25519", "kid": self._service}
        signed = jws.serialize_compact(header, claim, key, algorithms=["Ed25519"])
        with self._checkpoints.open("a") as file:
            file.write(signed + "\n")


class Verdict(NamedTuple):
    """What a check of the chain found. `broken` says what is wrong, with the seal where it begins."""

    rows: int
    unsealed: int
    checkpoints: int
    broken: str = ""


async def verify(engine: AsyncEngine, checkpoints: Path | None = None, keys: KeySet | None = None) -> Verdict:
    """Walk the chain from its beginning and compare it with the signed checkpoints."""
    wanted: dict[int, bytes] = {}
    try:
        for signed, digest in _read_checkpoints(checkpoints, keys):
            if wanted.setdefault(signed, digest) != digest:
                return Verdict(0, 0, 0, f"two chains were signed at {signed}: it was forked")
    except (JoseError, ValueError, KeyError, TypeError):
        return Verdict(0, 0, 0, f"checkpoint {len(wanted) + 1} is not one that the service signed")
    met = 0
    # One snapshot, taken after the file was read: what is sealed meanwhile is no gap.
    async with engine.execution_options(isolation_level="REPEATABLE READ").connect() as connection:
        seal, previous = 0, GENESIS
        while rows := (await connection.execute(_SEALED, {"after": seal})).all():
            for row in rows:
                if row.seal != seal + 1:
                    return Verdict(seal, 0, met, f"row {seal + 1} is missing")
                previous = link(previous, row.seal, row.body)
                if previous != bytes(row.hash):
                    return Verdict(seal, 0, met, f"row {row.seal} was changed")
                seal = row.seal
                if seal in wanted:
                    if wanted.pop(seal) != previous:
                        return Verdict(seal, 0, met, f"the chain up to {seal} is another than the one that was signed")
                    met += 1
        if wanted:
            return Verdict(seal, 0, met, f"the chain ends at {seal}, signed was {max(wanted)}")
        return await _ends(connection, seal, previous, met)


async def _ends(connection: AsyncConnection, seal: int, previous: bytes, met: int) -> Verdict:
    head = (await connection.execute(text("SELECT seal, hash FROM audit_head WHERE name = 'audit'"))).first()
    unsealed = (await connection.execute(text("SELECT count(*) FROM audit WHERE seal IS NULL"))).scalar_one()
    if head is None or head.seal < seal or (head.seal == seal and bytes(head.hash) != previous):
        return Verdict(seal, unsealed, met, "the head is not the chain's")
    if head.seal > seal:
        return Verdict(seal, unsealed, met, f"row {seal + 1} is missing")
    return Verdict(seal, unsealed, met)


def _read_checkpoints(file: Path | None, keys: KeySet | None) -> Iterable[tuple[int, bytes]]:
    if file is None or keys is None or not file.exists():
        return
    for line in file.read_text().split():
        signed = jws.deserialize_compact(line, keys, algorithms=["Ed25519"])
        claim = json.loads(signed.payload or b"")
        if signed.headers().get("kid") != claim["service"]:
            raise ValueError("signed by another service")
        yield claim["seal"], bytes.fromhex(claim["hash"])


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
