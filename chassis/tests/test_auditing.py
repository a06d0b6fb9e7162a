"""The audit's seals: what a check finds, what the database refuses, and that no writer or second sealer breaks the chain."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from care.audit.v1 import audit_pb2, audit_pb2_grpc
from joserfc import jws
from joserfc.jwk import KeySet, OKPKey
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from chassis import migrations
from chassis.auditing import Sealer, Verdict, link, verify
from chassis.errors import Invalid, NotFound, problem_from_rpc
from chassis.ids import new_id
from chassis.settings import Settings
from chassis.tests.small import ALL, Small, models

_INSERT = text(
    "INSERT INTO audit (id, tenant_id, actor, method, outcome, subject_ids)"
    " VALUES (:id, :tenant, 'staff:x', 'care.x.v1.X/Get', 'OK', ARRAY[CAST(:tenant AS uuid)])"
)
_AS_THEY_WERE = "INSERT INTO audit (id, tenant_id, actor, method, outcome) SELECT gen_random_uuid(), tenant_id, actor, method, outcome"
_REVISIONS = Path(__file__).parent / "small" / "migrations"
_GUARDED = ("audit", "audit_seal")
_GENESIS = "UPDATE audit_head SET seal = 0, hash = sha256('care audit')"


class Chain:
    """An audit of its own, its key and its checkpoints."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.engine = create_async_engine(url, pool_size=40, hide_parameters=True)
        self.key = OKPKey.generate_key("Ed25519", {"kid": "things"}, private=True)
        self.other = OKPKey.generate_key("Ed25519", {"kid": "others"}, private=True)
        self.keys = KeySet([self.key, self.other])
        self.checkpoints = folder / "checkpoints"
        self.files = {key.kid: folder / f"{key.kid}.json" for key in (self.key, self.other)}
        for key in (self.key, self.other):
            self.files[key.kid].write_text(json.dumps(key.as_dict(private=True)))
        self.log = _Log()

    def sealer(self, service: str = "things") -> Sealer:
        settings = Settings(
            audit_checkpoint_file=self.checkpoints, service_key_file=self.files[service], relay_lease=2.0
        )
        return Sealer(self.engine, settings, SimpleNamespace(service=service, log=self.log))  # type: ignore[arg-type]

    async def write(self, rows: int = 1) -> None:
        async with self.engine.begin() as connection:
            for _ in range(rows):
                await connection.execute(_INSERT, {"id": new_id(), "tenant": new_id()})

    async def sql(self, *statements: str, guarded: bool = False) -> None:
        """As somebody who owns the tables and puts the guard aside."""
        async with self.engine.begin() as connection:
            for table in () if guarded else _GUARDED:
                await connection.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER USER"))
            for statement in statements:
                await connection.execute(text(statement))
            for table in () if guarded else _GUARDED:
                await connection.execute(text(f"ALTER TABLE {table} ENABLE TRIGGER USER"))

    async def row(self, seal: int, place: int) -> str:
        """The id of one of the rows under a seal."""
        async with self.engine.connect() as connection:
            found = text("SELECT ids[:place]::text FROM audit_seal WHERE seal = :seal")
            row: str = (await connection.execute(found, {"seal": seal, "place": place})).scalar_one()
            return row

    async def verdict(self) -> Verdict:
        return await verify(self.engine, self.checkpoints, self.keys)


class _Log:
    def __init__(self) -> None:
        self.errors: list[tuple[str, dict[str, Any]]] = []

    def warning(self, *_: Any, **__: Any) -> None: ...

    def error(self, event: str, **fields: Any) -> None:
        self.errors.append((event, fields))


@pytest.fixture(scope="module")
async def schema(database: Any) -> str:
    url: str = await database("audit")
    await migrations.upgrade(url, _REVISIONS, models().Base.metadata)
    return url


@pytest.fixture
async def chain(schema: str, tmp_path: Path) -> AsyncIterator[Chain]:
    chain = Chain(schema, tmp_path)
    await chain.sql("TRUNCATE audit, audit_open, audit_seal", _GENESIS, "DELETE FROM lease")
    yield chain
    await chain.engine.dispose()


@pytest.fixture
async def sealed(chain: Chain) -> Chain:
    """Three batches, ten rows, three checkpoints."""
    for rows in (3, 3, 4):
        await chain.write(rows)
        assert await chain.sealer().seal() == rows
    return chain


async def test_a_chain_that_nobody_touched_is_whole(sealed: Chain) -> None:
    await sealed.write(2)
    assert await sealed.verdict() == Verdict(rows=10, unsealed=2, checkpoints=3)


@pytest.mark.parametrize(
    "change",
    [
        "actor = 'staff:y'", "outcome = 'NOT_FOUND'", "time = time + interval '1 microsecond'",
        "subject_ids = '{}'", "method = 'care.x.v1.X/List'", "tenant_id = gen_random_uuid()", "purpose = 'x'",
        "permission = 'x'", "on_behalf_of = 'x'", "trace_id = 'x'",
    ],
)  # fmt: skip
async def test_a_changed_row_is_found(sealed: Chain, change: str) -> None:
    row = await sealed.row(2, 2)
    await sealed.sql(f"UPDATE audit SET {change} WHERE id = '{row}'")
    assert (await sealed.verdict()).broken == f"row {row} was changed"


async def test_each_column_of_a_row_is_under_its_seal(sealed: Chain) -> None:
    """Those of the test above, and the id."""
    async with sealed.engine.connect() as connection:
        columns = "SELECT column_name FROM information_schema.columns WHERE table_name = 'audit'"
        found = set((await connection.execute(text(columns))).scalars())
    assert found == {
        "id", "tenant_id", "time", "actor", "on_behalf_of", "method", "permission", "purpose", "subject_ids", "outcome",
        "trace_id",
    }  # fmt: skip


@pytest.mark.parametrize("change", ["DELETE FROM audit", "UPDATE audit SET id = gen_random_uuid()"])
async def test_a_removed_row_is_found(sealed: Chain, change: str) -> None:
    row = await sealed.row(2, 2)
    await sealed.sql(f"{change} WHERE id = '{row}'")
    assert (await sealed.verdict()).broken == f"row {row} is missing"


async def test_a_row_that_is_removed_before_its_seal_is_found(sealed: Chain) -> None:
    await sealed.write()
    async with sealed.engine.connect() as connection:
        row = (await connection.execute(text("SELECT id FROM audit_open"))).scalar_one()
    await sealed.write()
    await sealed.sql(f"DELETE FROM audit WHERE id = '{row}'")
    assert await sealed.verdict() == Verdict(10, 2, 3, f"row {row} is missing")
    assert sealed.log.errors == []
    assert await sealed.sealer().seal() == 2
    assert sealed.log.errors == [("audit rows were removed before they were sealed", {"rows": 1})]
    assert (await sealed.verdict()).broken == f"row {row} is missing"
    # Nor can another take its place.
    await sealed.sql(f"INSERT INTO audit (id, tenant_id, actor, method, outcome) VALUES ('{row}', '{row}', '', '', '')")
    assert (await sealed.verdict()).broken == f"row {row} was changed"


async def test_a_row_put_in_between_is_found(sealed: Chain) -> None:
    await sealed.write()
    await sealed.sql(f"{_AS_THEY_WERE} FROM audit LIMIT 2")
    assert await sealed.verdict() == Verdict(10, 1, 3, "2 rows stand under no seal")
    await sealed.sql("DELETE FROM audit_open")
    assert await sealed.verdict() == Verdict(10, 0, 3, "3 rows stand under no seal")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE audit_seal SET hash = sha256('x') WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET digests = sha256('x') || substr(digests, 33) WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET digests = digests || '\\x00' WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET ids[2] = gen_random_uuid() WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET ids[2] = NULL WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET ids = ids || gen_random_uuid() WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET ids = '{}', digests = '' WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET rows = 7 WHERE seal = 2", "seal 2 was changed"),
        ("UPDATE audit_seal SET seal = 4 WHERE seal = 2", "seal 2 is missing"),
        ("DELETE FROM audit_seal WHERE seal = 1", "seal 1 is missing"),
        ("DELETE FROM audit_seal WHERE seal = 2", "seal 2 is missing"),
    ],
)
async def test_a_changed_or_removed_seal_is_found(sealed: Chain, change: str, found: str) -> None:
    await sealed.sql(change)
    assert (await sealed.verdict()).broken == found


async def _rechain(chain: Chain, after: int) -> None:
    """What a forger who knows the formula does: digests and hashes anew behind that seal, and the head with them."""
    digest = (
        "sha256(convert_to(json_build_array(id, tenant_id, floor(extract(epoch FROM time) * 1000000)::bigint, actor,"
        " on_behalf_of, method, permission, purpose, subject_ids, outcome, trace_id)::text, 'UTF8'))"
    )
    anew = text(
        f"UPDATE audit_seal SET digests = (SELECT string_agg({digest}, '' ORDER BY id) FROM audit WHERE id = ANY (ids))"
        " WHERE seal > :after"
    )
    seals = text(
        "SELECT seal, digests, hash, (SELECT string_agg(uuid_send(id), '' ORDER BY id) FROM unnest(ids) AS each (id)) AS ids"
        " FROM audit_seal ORDER BY seal"
    )
    async with chain.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE audit_seal DISABLE TRIGGER USER"))
        await connection.execute(anew, {"after": after})
        found = (await connection.execute(seals)).all()
        previous = found[after - 1].hash
        for seal in found[after:]:
            previous = link(previous, seal.seal, seal.ids, seal.digests)
            forged = {"hash": previous, "seal": seal.seal}
            await connection.execute(text("UPDATE audit_seal SET hash = :hash WHERE seal = :seal"), forged)
        await connection.execute(text("UPDATE audit_head SET hash = :hash"), {"hash": previous})
        await connection.execute(text("ALTER TABLE audit_seal ENABLE TRIGGER USER"))


async def test_a_chain_that_was_forged_to_its_end_does_not_match_what_was_signed(sealed: Chain) -> None:
    await sealed.sql(f"UPDATE audit SET actor = 'staff:y' WHERE id = '{await sealed.row(2, 2)}'")
    await _rechain(sealed, 1)
    assert (await verify(sealed.engine)).broken == ""  # by itself it looks whole
    assert (await sealed.verdict()).broken == "the chain up to 2 is another than the one that was signed"


async def test_a_tail_that_was_cut_off_is_found_by_the_signed_head(sealed: Chain) -> None:
    await sealed.sql(
        "DELETE FROM audit WHERE id = ANY (SELECT unnest(ids) FROM audit_seal WHERE seal > 2)",
        "DELETE FROM audit_seal WHERE seal > 2",
        "UPDATE audit_head SET seal = 2, hash = (SELECT hash FROM audit_seal WHERE seal = 2)",
    )
    assert (await verify(sealed.engine)).broken == ""
    assert (await sealed.verdict()).broken == "the chain ends at 2, signed was 3"
    await sealed.sql("TRUNCATE audit, audit_seal", _GENESIS)
    assert (await verify(sealed.engine)).broken == ""
    assert (await sealed.verdict()).broken == "the chain ends at 0, signed was 3"


async def test_a_head_that_runs_before_or_beside_its_chain_is_found(sealed: Chain) -> None:
    await sealed.sql("DELETE FROM audit_seal WHERE seal = 3")
    assert (await verify(sealed.engine)).broken == "seal 3 is missing"
    await sealed.sql("UPDATE audit_head SET seal = 2")
    assert (await verify(sealed.engine)).broken == "the head is not the chain's"
    await sealed.sql("UPDATE audit_head SET seal = 1")
    assert (await verify(sealed.engine)).broken == "the head is not the chain's"
    await sealed.sql("DELETE FROM audit_head")
    assert (await verify(sealed.engine)).broken == "the head is not the chain's"
    await sealed.sql("INSERT INTO audit_head (name, seal, hash) VALUES ('audit', 0, '')")


async def test_checkpoints_that_are_not_the_services_own_are_found(sealed: Chain) -> None:
    lines = sealed.checkpoints.read_text().split()
    sealed.checkpoints.write_text("\n".join([lines[0], lines[1][:-6] + "AAAAAA"]))
    assert (await sealed.verdict()).broken == "checkpoint 2 is not one that the service signed"
    sealed.checkpoints.write_text("\n".join([lines[0], "nonsense"]))
    assert (await sealed.verdict()).broken == "checkpoint 2 is not one that the service signed"
    # Another service's stolen key speaks for nobody else.
    sealed.checkpoints.write_text(lines[0] + "\n")
    forger = sealed.sealer()
    forger._key_file = sealed.files["others"]
    forger._checkpoint(3, 10, b"x" * 32)
    assert (await sealed.verdict()).broken != ""


async def test_a_fork_shows_by_two_signatures_under_one_seal(sealed: Chain) -> None:
    sealed.sealer()._checkpoint(2, 6, b"another chain's hash of 32 bytes")
    assert (await sealed.verdict()).broken == "two chains were signed at 2: it was forked"


async def test_a_signature_under_another_number_of_rows_is_found(sealed: Chain) -> None:
    lines = sealed.checkpoints.read_text().split()
    claim = json.loads(jws.deserialize_compact(lines[-1], sealed.keys, algorithms=["Ed25519"]).payload or b"")
    sealed.checkpoints.write_text("\n".join(lines[:-1]) + "\n")
    sealed.sealer()._checkpoint(3, 11, bytes.fromhex(claim["hash"]))
    assert (await sealed.verdict()).broken == "the chain up to 3 is another than the one that was signed"


async def test_what_was_signed_when_each_row_had_a_seal_of_its_own_is_passed_over(sealed: Chain) -> None:
    lines = sealed.checkpoints.read_text().split()

    def earlier(key: OKPKey) -> str:
        claim = json.dumps({"service": "things", "seal": 2, "hash": "00" * 32}).encode()
        return jws.serialize_compact({"alg": "Ed25519", "kid": key.kid}, claim, key, algorithms=["Ed25519"])

    sealed.checkpoints.write_text("\n".join([earlier(sealed.key), earlier(sealed.key), *lines]))
    assert await sealed.verdict() == Verdict(10, 0, 3)
    sealed.checkpoints.write_text("\n".join([earlier(sealed.key), *lines, earlier(sealed.other)]))
    assert (await sealed.verdict()).broken == "checkpoint 5 is not one that the service signed"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET outcome = 'OK'",
        "UPDATE audit SET outcome = 'X' WHERE id = (SELECT id FROM audit_open)",
        "INSERT INTO audit SELECT * FROM audit LIMIT 1 ON CONFLICT (id) DO UPDATE SET outcome = 'X'",
        "DELETE FROM audit",
        "DELETE FROM audit WHERE id = (SELECT id FROM audit_open)",
        "TRUNCATE audit",
        "UPDATE audit_seal SET hash = sha256('x')",
        "UPDATE audit_seal SET rows = rows",
        "DELETE FROM audit_seal WHERE seal = 3",
        "TRUNCATE audit_seal",
    ],
)
async def test_the_database_refuses_to_change_what_is_written(sealed: Chain, statement: str) -> None:
    await sealed.write()
    with pytest.raises(DBAPIError, match="audit rows and seals stay as they are"):
        await sealed.sql(statement, guarded=True)
    assert await sealed.verdict() == Verdict(10, 1, 3)


async def test_a_row_that_is_there_already_waits_once(chain: Chain) -> None:
    many = "INSERT INTO audit (id, tenant_id, actor, method, outcome) SELECT id, id, '', '', '' FROM unnest(CAST(:ids AS uuid[])) AS id"
    ids = [new_id() for _ in range(2500)]
    for some in (ids[:1500], ids):
        async with chain.engine.begin() as connection:
            await connection.execute(text(many + " ON CONFLICT (id) DO NOTHING"), {"ids": some})
    assert await chain.verdict() == Verdict(0, 2500, 0)
    assert [await chain.sealer().seal() for _ in range(4)] == [1000, 1000, 500, 0]
    assert await chain.verdict() == Verdict(2500, 0, 3)


async def test_writers_that_commit_in_any_order_leave_no_gap(chain: Chain) -> None:
    """Ids are drawn before the commit; a cursor over them would pass over the late ones."""
    written = 0

    async def writer(number: int) -> None:
        nonlocal written
        for turn in range(6):
            async with chain.engine.begin() as connection:
                await connection.execute(_INSERT, {"id": new_id(), "tenant": new_id()})
                await asyncio.sleep(0.001 * ((number * 7 + turn * 3) % 23))
                await connection.execute(_INSERT, {"id": new_id(), "tenant": new_id()})
            written += 2

    sealer, writing = chain.sealer(), asyncio.gather(*(writer(number) for number in range(32)))
    while not writing.done():
        await sealer.seal()
        await asyncio.sleep(0.005)
    await writing
    await sealer.seal()
    verdict = await chain.verdict()
    assert (verdict.rows, verdict.unsealed, verdict.broken) == (written, 0, "") == (384, 0, "")


async def test_two_sealers_at_once_do_not_fork_the_chain(chain: Chain) -> None:
    """Even if both hold that they may: a lease can be lost in the middle."""

    async def write() -> None:
        for _ in range(15):
            await chain.write(2)

    async def seal(sealer: Sealer) -> None:
        while not writing.done():
            await sealer.seal()

    writing = asyncio.gather(*(write() for _ in range(4)))
    await asyncio.gather(*(seal(chain.sealer()) for _ in range(2)))
    await writing
    await chain.sealer().seal()
    verdict = await chain.verdict()
    assert (verdict.rows, verdict.unsealed, verdict.broken) == (120, 0, "")


async def test_a_check_of_a_chain_that_grows_meanwhile_finds_it_whole(chain: Chain) -> None:
    async def grow() -> None:
        sealer = chain.sealer()
        for _ in range(40):
            await chain.write()
            await sealer.seal()

    growing, checks = asyncio.ensure_future(grow()), 0
    while not growing.done():
        assert (await chain.verdict()).broken == ""
        checks += 1
    assert checks > 3


async def test_rows_of_the_earlier_form_end_in_a_whole_chain(database: Any, tmp_path: Path) -> None:
    """And calls of the release before go on: what they have not committed while the columns go is sealed, too."""
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    shutil.copy(_REVISIONS / "0001_first.py", earlier)
    url, metadata = await database("audit"), models().Base.metadata
    await migrations.upgrade(url, earlier, metadata)
    chain = Chain(url, tmp_path)
    await chain.write(4)
    await chain.sql(
        "UPDATE audit SET seal = n, hash = sha256('x') FROM (SELECT id AS other, row_number() OVER (ORDER BY id) AS n FROM audit)"
        " WHERE id = other",
        "UPDATE audit_head SET seal = 4, hash = sha256('x')",
        guarded=True,
    )
    await chain.write(3)
    async with chain.engine.begin() as connection:
        await connection.execute(_INSERT, {"id": new_id(), "tenant": new_id()})
        upgrading = asyncio.create_task(migrations.upgrade(url, _REVISIONS, metadata))
        await asyncio.sleep(0.5)
        assert not upgrading.done()
    await upgrading
    assert await chain.verdict() == Verdict(0, 8, 0)
    await chain.write()
    assert await chain.sealer().seal() == 9
    assert await chain.verdict() == Verdict(9, 0, 1)
    await chain.engine.dispose()


async def test_sealers_take_turns_and_another_goes_on(chain: Chain) -> None:
    first, second = chain.sealer(), chain.sealer()
    await first.start()
    await asyncio.sleep(0.3)
    await second.start()
    await chain.write(3)
    await _until(lambda: _all_sealed(chain))
    assert first._lease.epoch == 1
    assert second._lease.epoch is None
    await first.stop()
    await chain.write(3)
    await _until(lambda: _all_sealed(chain))
    assert second._lease.epoch == 2
    await second.stop()
    assert (await chain.verdict())[::3] == (6, "")


async def _all_sealed(chain: Chain) -> bool:
    return (await chain.verdict()).unsealed == 0


async def _until(condition: Any, within: float = 15) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.05)


# -- who saw a record --------------------------------------------------------------------------------------------------


async def accesses(small: Small, who: str, **fields: Any) -> audit_pb2.ListAccessesResponse:
    import grpc

    stub = audit_pb2_grpc.AuditServiceStub(small.harness.channel(small.name))
    try:
        answer: audit_pb2.ListAccessesResponse = await stub.ListAccesses(
            audit_pb2.ListAccessesRequest(**fields), metadata=small.harness.as_user(who), timeout=10
        )
        return answer
    except grpc.RpcError as error:
        raise problem_from_rpc(error) from None


async def test_who_saw_a_record_is_told_page_by_page_latest_first(small: Small) -> None:
    await small.harness.staff("outsider of the audit", ALL, clinics=[new_id()])
    patient, other = await small.patient(), await small.patient()
    consent = await small.consent(patient)
    for _ in range(3):
        await small.rpc("GetConsent", id=consent.id)
    await small.consent(other)
    found: list[audit_pb2.Access] = []
    token = ""
    while True:
        page = await accesses(small, "ada", patient_id=patient, page_size=2, page_token=token)
        found += page.accesses
        if not (token := page.next_page_token):
            break
    methods = [one.method.rpartition("/")[2] for one in found]
    assert methods == ["GetConsent"] * 3 + ["CreateConsent"]
    assert {(one.actor, one.service, one.outcome) for one in found} == {(f"staff:{small.ada}", "referrals", "OK")}
    times = [one.time.ToNanoseconds() for one in found]
    assert times == sorted(times, reverse=True)
    token = (await accesses(small, "ada", patient_id=patient, page_size=1)).next_page_token
    for fields in ({"patient_id": other, "page_token": token}, {"patient_id": patient, "page_token": "x"}):
        with pytest.raises(Invalid):
            await accesses(small, "ada", **fields)
    with pytest.raises(NotFound):
        await accesses(small, "outsider of the audit", patient_id=patient)


async def test_a_row_without_a_time_that_can_be_counted_is_sealed_as_well(chain: Chain) -> None:
    await chain.sql(
        "INSERT INTO audit (id, tenant_id, actor, method, outcome, time)"
        " VALUES (gen_random_uuid(), gen_random_uuid(), 'staff:x', 'care.x.v1.X/Get', 'OK', 'infinity')",
        guarded=True,
    )
    assert await chain.sealer().seal() == 1
    assert await chain.verdict() == Verdict(rows=1, unsealed=0, checkpoints=1)
