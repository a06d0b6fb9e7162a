"""Keys are stable, private and taken by the services; the issuer is no issuer in production."""

import stat

import pytest

from chassis.auth import Credential, Verifier
from chassis.errors import Unauthenticated
from system import issuer
from system.keys import Keys
from system.topology import NODES


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys").ensure()


def test_keys_are_the_same_after_a_restart_and_readable_by_their_owner_only(keys):
    before = {path.name: path.read_bytes() for path in keys.folder.iterdir()}
    Keys(keys.folder).ensure()
    assert {path.name: path.read_bytes() for path in keys.folder.iterdir()} == before
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.folder.iterdir()} == {0o600}
    assert {f"{name}.jwk" for name in NODES} < set(before)


def test_public_files_hold_no_private_part(keys):
    for path in (keys.issuer_keys_file, keys.service_keys_file):
        assert '"d"' not in path.read_text()


async def test_a_service_takes_the_tokens_of_the_issuer_and_of_its_peers(keys):
    verifier = Verifier([issuer.accepted(keys)], service_keys_file=keys.service_keys_file)
    identity = await verifier.verify(issuer.DevelopmentIssuer(keys).issue(role="nurse"))
    assert (identity.tenant_id, identity.issuer, identity.subject) == (issuer.TENANT_ID, issuer.ISSUER, "nurse@sample")
    for name in NODES:
        own = await verifier.verify(Credential(name, keys.service_key_file(name)).token())
        assert own.service == name


async def test_a_token_of_another_folder_is_not_taken(keys, tmp_path):
    other = Keys(tmp_path / "other").ensure()
    with pytest.raises(Unauthenticated, match="TOKEN_INVALID"):
        await Verifier([issuer.accepted(keys)]).verify(issuer.DevelopmentIssuer(other).issue(role="admin"))


async def test_a_token_of_an_unknown_tenant_is_not_taken(keys):
    token = issuer.DevelopmentIssuer(keys).issue(role="admin", tenant="elsewhere")
    with pytest.raises(Unauthenticated) as refused:
        await Verifier([issuer.accepted(keys)]).verify(token)
    assert refused.value.reason == "TENANT_UNKNOWN"


def test_the_issuer_refuses_in_production(keys, monkeypatch):
    monkeypatch.setenv("CARE_ENVIRONMENT", "Production")
    with pytest.raises(issuer.NotInProduction, match="refuses to work in production"):
        issuer.DevelopmentIssuer(keys)


def test_the_issuer_wants_exactly_one_whom(keys):
    made = issuer.DevelopmentIssuer(keys)
    for role, patient_id in (("", ""), ("admin", "1"), ("nobody", "")):
        with pytest.raises(ValueError):
            made.issue(role=role, patient_id=patient_id)
