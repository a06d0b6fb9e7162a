"""The audit's seal: what a check finds, what the database refuses, and that no writer or second sealer breaks the chain."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from care.audit.v1 import audit_pb2, audit_pb2_grpc
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

    def sealer(self, service: str = "things") -> Sealer:
        settings = Settings(
            audit_checkpoint_file=self.checkpoints, service_key_file=self.files[service], relay_lease=2.0
        )
        return Sealer(self.engine, settings, SimpleNamespace(service=service, log=_Silent()))  # type: ignore[arg-type]

    async def write(self, rows: int = 1) -> None:
        async with self.engine.begin() as connection:
            for _ in range(rows):
                await connection.execute(_INSERT, {"id": new_id(), "tenant": new_id()})

    async def sql(self, *statements: str, guarded: bool = False) -> None:
        """As somebody who owns the tables and puts the guard aside."""
        async with self.engine.begin() as connection:
            if not guarded:
                await connection.execute(text("ALTER TABLE audit DISABLE TRIGGER USER"))
            for statement in statements:
                await connection.execute(text(statement))
            if not guarded:
                await connection.execute(text("ALTER TABLE audit ENABLE TRIGGER USER"))

    async def verdict(self) -> Verdict:
        return await verify(self.engine, self.checkpoints, self.keys)


class _Silent:
    def warning(self, *_: Any, **__: Any) -> None: ...


@pytest.fixture(scope="module")
async def schema(database: Any) -> str:
    url: str = await database("audit")
    small = Path(__file__).parent / "small" / "migrations"
    await migrations.upgrade(url, small, models().Base.metadata)
    return url


@pytest.fixture
async def chain(schema: str, tmp_path: Path) -> AsyncIterator[Chain]:
    chain = Chain(schema, tmp_path)
    genesis = "UPDATE audit_head SET seal = 0, hash = sha256('care audit')"
    await chain.sql("DELETE FROM audit", genesis, "DELETE FROM lease")
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
        "permission = 'x'", "on_behalf_of = 'x'", "trace_id = 'x'", "id = gen_random_uuid()", "hash = sha256('x')",
    ],
)  # fmt: skip
async def test_a_changed_row_is_found(sealed: Chain, change: str) -> None:
    await sealed.sql(f"UPDATE audit SET {change} WHERE seal = 5")
    assert (await sealed.verdict()).broken == "row 5 was changed"


async def test_a_removed_row_is_found(sealed: Chain) -> None:
    await sealed.sql("DELETE FROM audit WHERE seal = 5")
    assert (await sealed.verdict()).broken == "row 5 is missing"


async def test_a_row_put_in_between_is_found(sealed: Chain) -> None:
    await sealed.sql(
        "UPDATE audit SET seal = seal + 100 WHERE seal > 5",
        "UPDATE audit SET seal = seal - 99 WHERE seal > 100",
        "INSERT INTO audit (id, tenant_id, actor, method, outcome, seal, hash)"
        " SELECT gen_random_uuid(), tenant_id, actor, method, outcome, 6, hash FROM audit WHERE seal = 5",
    )
    assert (await sealed.verdict()).broken == "row 6 was changed"


async def _rechain(chain: Chain, after: int) -> None:
    """What a forger who knows the formula does: hashes anew from there on, and the head with them."""
    body = (
        "jsonb_build_array(id, tenant_id, floor(extract(epoch FROM time) * 1000000)::bigint, actor, on_behalf_of,"
        " method, permission, purpose, subject_ids, outcome, trace_id)::text"
    )
    async with chain.engine.begin() as connection:
        await connection.execute(text("ALTER TABLE audit DISABLE TRIGGER USER"))
        rows = (await connection.execute(text(f"SELECT id, seal, hash, {body} AS body FROM audit ORDER BY seal"))).all()
        previous = bytes(rows[after - 1].hash)
        for row in rows[after:]:
            previous = link(previous, row.seal, row.body)
            await connection.execute(text("UPDATE audit SET hash = :h WHERE id = :i"), {"h": previous, "i": row.id})
        await connection.execute(
            text("UPDATE audit_head SET seal = :s, hash = :h"), {"s": rows[-1].seal, "h": previous}
        )
        await connection.execute(text("ALTER TABLE audit ENABLE TRIGGER USER"))


async def test_a_chain_that_was_forged_to_its_end_does_not_match_what_was_signed(sealed: Chain) -> None:
    await sealed.sql("UPDATE audit SET actor = 'staff:y' WHERE seal = 5")
    await _rechain(sealed, 4)
    assert (await verify(sealed.engine)).broken == ""  # by itself it looks whole
    assert (await sealed.verdict()).broken == "the chain up to 6 is another than the one that was signed"


async def test_a_tail_that_was_cut_off_is_found_by_the_signed_head(sealed: Chain) -> None:
    await sealed.sql(
        "DELETE FROM audit WHERE seal > 6",
        "UPDATE audit_head SET seal = 6, hash = (SELECT hash FROM audit WHERE seal = 6)",
    )
    assert (await verify(sealed.engine)).broken == ""
    assert (await sealed.verdict()).broken == "the chain ends at 6, signed was 10"
    await sealed.sql("DELETE FROM audit", "UPDATE audit_head SET seal = 0, hash = sha256('care audit')")
    assert (await sealed.verdict()).broken == "the chain ends at 0, signed was 10"


async def test_a_head_that_runs_before_or_beside_its_chain_is_found(sealed: Chain) -> None:
    await sealed.sql("DELETE FROM audit WHERE seal > 8")
    assert (await verify(sealed.engine)).broken == "row 9 is missing"
    await sealed.sql("UPDATE audit_head SET seal = 8")
    assert (await verify(sealed.engine)).broken == "the head is not the chain's"


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
    forger._checkpoint(10, b"x" * 32)
    assert (await sealed.verdict()).broken != ""


async def test_a_fork_shows_by_two_signatures_under_one_seal(sealed: Chain) -> None:
    sealed.sealer()._checkpoint(6, b"another chain's hash of 32 bytes")
    assert (await sealed.verdict()).broken == "two chains were signed at 6: it was forked"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET outcome = 'OK' WHERE seal = 1",
        "UPDATE audit SET seal = 99 WHERE seal = 1",
        "UPDATE audit SET seal = NULL WHERE seal = 1",
        "UPDATE audit SET outcome = 'X' WHERE seal IS NULL",
        "UPDATE audit SET outcome = 'X', seal = 11, hash = '' WHERE seal IS NULL",
        "DELETE FROM audit WHERE seal = 1",
        "DELETE FROM audit WHERE seal IS NULL",
        "TRUNCATE audit",
    ],
)
async def test_the_database_refuses_to_change_what_is_written(sealed: Chain, statement: str) -> None:
    await sealed.write()
    with pytest.raises(DBAPIError):
        await sealed.sql(statement, guarded=True)
    assert await sealed.verdict() == Verdict(10, 1, 3)


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
