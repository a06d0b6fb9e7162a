"""Tokens: what verifies, what must not, how keys are fetched, and how long a verified token is believed."""

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey

from chassis.auth import Credential, Verifier
from chassis.errors import Problem, Unauthenticated, Unavailable
from chassis.settings import Issuer

ISSUER, OTHER = "https://issuer.test", "https://other.test"
EC = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
RSA = RSAKey.generate_key(2048, {"kid": "rsa"}, private=True)
STRANGER = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def claims(clock: Clock, **more: Any) -> dict[str, Any]:
    full = {"iss": ISSUER, "sub": "ada", "aud": "care", "tenant": "north", "exp": int(clock.now) + 600, **more}
    return {name: value for name, value in full.items() if value is not None}


def token(key: Any, told: dict[str, Any], **header: Any) -> str:
    algorithm = {"EC": "ES256", "RSA": "RS256", "OKP": "Ed25519"}[key.key_type]
    full = {"alg": algorithm, "kid": key.kid, **header}
    return jwt.encode({n: v for n, v in full.items() if v is not None}, told, key, algorithms=[algorithm])


def unsigned(header: dict[str, Any], told: Any, signature: bytes = b"") -> str:
    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    head, body = part(json.dumps(header).encode()), part(told if isinstance(told, bytes) else json.dumps(told).encode())
    return f"{head}.{body}.{part(signature)}"


def hmac_signed(secret: bytes, told: dict[str, Any], kid: str) -> str:
    header = {"alg": "HS256", "kid": kid}
    said = unsigned(header, told).rstrip(".")
    return unsigned(header, told, hmac.digest(secret, said.encode(), "sha256"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jwks(tmp_path: Path) -> Path:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(KeySet([EC, RSA]).as_dict(private=False)))
    return file


@pytest.fixture
def verifier(clock: Clock, jwks: Path) -> Verifier:
    return Verifier([Issuer(issuer=ISSUER, jwks_file=jwks, tenants={"north": "T1"})], clock=clock)


async def refusal(verifier: Verifier, said: str) -> str:
    with pytest.raises(Problem) as refused:
        await verifier.verify(said)
    assert isinstance(refused.value, Unauthenticated)
    assert not said or said not in refused.value.message
    return refused.value.reason


@pytest.mark.parametrize("key", [EC, RSA], ids=["ES256", "RS256"])
async def test_a_good_token_names_tenant_issuer_and_subject(verifier: Verifier, clock: Clock, key: Any) -> None:
    identity = await verifier.verify(token(key, claims(clock)))
    assert (identity.tenant_id, identity.issuer, identity.subject, identity.service) == ("T1", ISSUER, "ada", None)
    assert await verifier.verify(token(key, claims(clock, aud=["other", "care"])))


async def test_confused_tokens_are_refused(verifier: Verifier, clock: Clock, jwks: Path) -> None:
    good = claims(clock)
    pem = RSA.as_pem(private=False)
    jwk = json.dumps(RSA.as_dict(private=False)).encode()
    forged = {
        "alg none": unsigned({"alg": "none"}, good),
        "alg None with a kid": unsigned({"alg": "None", "kid": "ec"}, good),
        "HS256 with the public key as PEM": hmac_signed(pem, good, "rsa"),
        "HS256 with the public JWK": hmac_signed(jwk, good, "rsa"),
        "HS256 with nothing": hmac_signed(b"", good, "rsa"),
        "another's key under a known kid": token(STRANGER, good),
        "an unknown kid": token(ECKey.generate_key("P-256", {"kid": "who"}, private=True), good),
        "no kid where there are several keys": token(EC, good, kid=None),
        "an RSA key's kid with ES256": token(EC, good, kid="rsa"),
        "a path as kid": token(EC, good, kid="../../etc/passwd"),
        "a key that the token brings along": token(STRANGER, good, jwk=STRANGER.as_dict(private=False)),
        "no signature": token(EC, good).rpartition(".")[0] + ".",
        "another body": unsigned({"alg": "ES256", "kid": "ec"}, good, b"0" * 64),
        "nothing at all": "...",
        "no token": "Geheim",
        "two parts": token(EC, good).rpartition(".")[0],
        "a list": unsigned({"alg": "ES256", "kid": "ec"}, [1]),
        "a pit of brackets": unsigned({"alg": "ES256", "kid": "ec"}, b"[" * 6000),
        "no text": unsigned({"alg": "ES256", "kid": "ec"}, b"\xff\xfe"),
    }
    for what, said in forged.items():
        assert await refusal(verifier, said) == "TOKEN_INVALID", what
    assert await refusal(verifier, "") == "TOKEN_MISSING"


async def test_claims_that_do_not_fit_are_refused(verifier: Verifier, clock: Clock) -> None:
    now = int(clock.now)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("TOKEN_INVALID", {"aud": "other"}),
        ("TOKEN_INVALID", {"aud": ["care2", "car"]}),
        ("TOKEN_INVALID", {"aud": None}),
        ("TOKEN_INVALID", {"aud": 7}),
        ("TOKEN_INVALID", {"exp": None}),
        ("TOKEN_INVALID", {"exp": "tomorrow"}),
        ("TOKEN_EXPIRED", {"exp": now - 6}),
        ("TOKEN_EXPIRED", {"exp": float("nan")}),
        ("TOKEN_INVALID", {"nbf": now + 60}),
        ("TOKEN_INVALID", {"nbf": "soon"}),
        ("TOKEN_INVALID", {"iss": OTHER}),
        ("TOKEN_INVALID", {"iss": None}),
        ("TENANT_UNKNOWN", {"tenant": "south"}),
        ("TENANT_UNKNOWN", {"tenant": None}),
        ("TENANT_UNKNOWN", {"tenant": "T1"}),
        ("TOKEN_INVALID", {"sub": None}),
        ("TOKEN_INVALID", {"sub": ""}),
        ("TOKEN_INVALID", {"sub": 7}),
    ]
    for reason, changes in wrong:
        assert await refusal(verifier, token(EC, claims(clock, **changes))) == reason, changes
    assert await verifier.verify(token(EC, claims(clock, exp=now - 4)))  # clocks differ a little


async def test_one_issuers_key_does_not_sign_for_another(clock: Clock, jwks: Path, tmp_path: Path) -> None:
    theirs = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(KeySet([theirs]).as_dict(private=False)))
    verifier = Verifier(
        [
            Issuer(issuer=ISSUER, jwks_file=jwks, tenants={"north": "T1"}),
            Issuer(issuer=OTHER, jwks_file=other, tenants={"north": "T2"}),
        ],
        clock=clock,
    )
    assert (await verifier.verify(token(theirs, claims(clock, iss=OTHER)))).tenant_id == "T2"
    assert await refusal(verifier, token(theirs, claims(clock))) == "TOKEN_INVALID"
    assert await refusal(verifier, token(EC, claims(clock, iss=OTHER))) == "TOKEN_INVALID"


async def test_a_verified_token_is_believed_until_its_end_and_a_minute_at_most(
    verifier: Verifier, clock: Clock
) -> None:
    long, short = token(EC, claims(clock)), token(EC, claims(clock, exp=int(clock.now) + 30))
    identity = await verifier.verify(long)
    await verifier.verify(short)
    clock.now += 29
    assert await verifier.verify(long) is identity
    clock.now += 7
    assert await refusal(verifier, short) == "TOKEN_EXPIRED"
    clock.now += 25
    assert await verifier.verify(long) is not identity


# -- keys over HTTP ----------------------------------------------------------------------------------------------------


class KeyServer:
    """Answers a JWKS; counts."""

    def __init__(self) -> None:
        self.keys: list[Any] = [EC]
        self.body: bytes | None = None
        self.asked = 0
        self.pause = 0.0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        await asyncio.sleep(self.pause)
        body = self.body if self.body is not None else json.dumps(KeySet(self.keys).as_dict(private=False)).encode()
        status = b"200 OK" if self.keys else b"503 Away"
        head = b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
        writer.write(head + body)
        await writer.drain()
        writer.close()


@pytest.fixture
async def server() -> AsyncIterator[KeyServer]:
    keys = KeyServer()
    listening = await asyncio.start_server(keys.serve, "127.0.0.1", 0)
    keys.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/jwks"
    yield keys
    listening.close()


@pytest.fixture
def remote(server: KeyServer, clock: Clock) -> Verifier:
    return Verifier([Issuer(issuer=ISSUER, jwks_url=server.url, tenants={"north": "T1"})], clock=clock)


@contextlib.contextmanager
def later(seconds: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The module's own name, not the clock itself, by which the loop's timers go.
    ahead = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds, time=time.time)
    with monkeypatch.context() as patched:
        patched.setattr("chassis.auth.time", ahead)
        yield


async def test_a_stampede_with_a_new_key_fetches_it_once_and_all_are_let_in(
    server: KeyServer, remote: Verifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remote.verify(token(EC, claims(clock)))
    assert server.asked == 1
    fresh = ECKey.generate_key("P-256", {"kid": "fresh"}, private=True)
    server.keys, server.pause = [EC, fresh], 0.2
    crowd = [token(fresh, claims(clock, sub=f"s{number}")) for number in range(64)]
    with later(11, monkeypatch):
        found = await asyncio.gather(*(remote.verify(one) for one in crowd))
    assert [one.subject for one in found] == [f"s{number}" for number in range(64)]
    assert server.asked == 2


async def test_the_first_stampede_fetches_once(server: KeyServer, remote: Verifier, clock: Clock) -> None:
    server.pause = 0.1
    await asyncio.gather(*(remote.verify(token(EC, claims(clock, sub=f"s{number}"))) for number in range(32)))
    assert server.asked == 1


async def test_unknown_keys_make_one_fetch_in_ten_seconds(
    server: KeyServer, remote: Verifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remote.verify(token(EC, claims(clock)))
    with later(11, monkeypatch):
        for _ in range(20):
            await refusal(remote, token(STRANGER, claims(clock), kid="who"))
    assert server.asked == 2


async def test_an_issuer_that_is_away_keeps_the_keys_that_are_known(
    server: KeyServer, remote: Verifier, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remote.verify(token(EC, claims(clock)))
    server.keys = []
    for body in (None, b"<html>", b"[]", b'{"keys": 7}', b'{"keys": []}', b"null", b'{"keys": [7]}'):
        server.body = b"" if body is None else body
        if body is not None:
            server.keys = [EC]
        with later(11 * server.asked, monkeypatch):
            asked = server.asked
            await refusal(remote, token(STRANGER, claims(clock), kid="who"))
            assert server.asked == asked + 1
            assert await remote.verify(token(EC, claims(clock, sub=f"after {body!r}")))


async def test_without_any_keys_the_answer_is_unavailable_not_refused(
    server: KeyServer, remote: Verifier, clock: Clock
) -> None:
    server.keys, server.body = [], b""
    with pytest.raises(Unavailable) as refused:
        await remote.verify(token(EC, claims(clock)))
    assert refused.value.reason == "ISSUER_UNAVAILABLE"


# -- our own services --------------------------------------------------------------------------------------------------


@pytest.fixture
def services(tmp_path: Path) -> dict[str, Path]:
    keys = {name: OKPKey.generate_key("Ed25519", {"kid": name}, private=True) for name in ("patients", "feedback")}
    for name, key in keys.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(key.as_dict(private=True)))
    (tmp_path / "all.json").write_text(json.dumps(KeySet(list(keys.values())).as_dict(private=False)))
    return {name: tmp_path / f"{name}.json" for name in (*keys, "all")}


async def test_a_service_says_who_it_is_and_speaks_for_nobody_else(services: dict[str, Path], clock: Clock) -> None:
    verifier = Verifier([], service_keys_file=services["all"], clock=clock)
    identity = await verifier.verify(Credential("patients", services["patients"], clock=clock).token())
    assert (identity.service, identity.subject) == ("patients", "system:patients")
    stolen = OKPKey.import_key(json.loads(services["feedback"].read_text()))
    told = {"iss": "care-services", "sub": "patients", "aud": "care", "exp": int(clock.now) + 60}
    for header in ({"kid": "feedback"}, {"kid": "patients"}, {"kid": None}):
        assert await refusal(verifier, token(stolen, told, **header)) == "TOKEN_INVALID", header
    assert await refusal(verifier, unsigned({"alg": "none"}, told)) == "TOKEN_INVALID"
    assert await refusal(verifier, token(EC, told)) == "TOKEN_INVALID"


async def test_a_credential_is_renewed_before_it_ends(services: dict[str, Path], clock: Clock) -> None:
    credential = Credential("patients", services["patients"], clock=clock)
    first = credential.token()
    clock.now += 39
    assert credential.token() == first
    clock.now += 2
    assert credential.token() != first
    with pytest.raises(Unavailable):
        Credential("patients", None).token()


async def test_a_replaced_file_of_service_keys_is_read_at_the_first_call(
    services: dict[str, Path], clock: Clock, tmp_path: Path
) -> None:
    verifier = Verifier([], service_keys_file=services["all"], clock=clock)
    await verifier.verify(Credential("patients", services["patients"], clock=clock).token())
    fresh = OKPKey.generate_key("Ed25519", {"kid": "patients"}, private=True)
    services["patients"].write_text(json.dumps(fresh.as_dict(private=True)))
    services["all"].write_text(json.dumps(KeySet([fresh]).as_dict(private=False)))
    clock.now += 1
    assert (
        await verifier.verify(Credential("patients", services["patients"], clock=clock).token())
    ).service == "patients"
    services["all"].unlink()  # replaced in two steps: what was read stays
    clock.now += 1
    assert await verifier.verify(Credential("patients", services["patients"], clock=clock).token())
