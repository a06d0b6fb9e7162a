"""`care doctor`: tries every connection that the settings name, and says what to do about those that fail."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx2
from joserfc.jwk import KeySet, OKPKey

from chassis import migrations
from chassis.bus import PARTITIONS
from chassis.database import engine
from chassis.main import bus_of
from chassis.settings import Issuer, Settings
from system import topology
from system.processes import is_serving
from system.topology import GATEWAY, NODES

_OLDEST_POSTGRES = 150000
_CLOCK_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    """What was looked at; `wrong` says what is the matter ("" if nothing), `todo` what mends it."""

    where: str
    what: str
    wrong: str = ""
    todo: str = ""


async def examine(name: str, settings: Settings) -> AsyncIterator[Finding]:
    """All about one workload, as it is configured. Never echoes a driver's text: that may hold a password or a value."""
    node = NODES[name]
    if node.database is not None:
        yield await _database(name, settings)
        yield await _schema(name, settings)
        yield await _bus(name, settings)
    for one in _keys(name, settings):
        yield one
    for issuer in settings.issuers:
        yield await _issuer(name, issuer)
    if not settings.issuers:
        yield Finding(name, "issuers", "none: every token would be refused", "set CARE_ISSUERS")
    for called in node.calls:
        yield await _peer(name, called, settings.peers.get(called, ""))
    if settings.otlp_endpoint:
        yield await _reachable(
            name, "collector", settings.otlp_endpoint, "see that it runs, or unset CARE_OTLP_ENDPOINT"
        )
    for channel in ("smtp", "sms"):
        if url := getattr(settings, f"{channel}_url", None):
            yield await _reachable(
                name, f"{channel} provider", url, f"see that it runs, or mend CARE_{channel.upper()}_URL"
            )
    yield await _itself(name, settings)


async def _database(name: str, settings: Settings) -> Finding:
    what = "database"
    url = settings.database_url.replace("postgresql+asyncpg://", "postgresql://", 1)
    try:
        async with asyncio.timeout(6):
            db = await asyncpg.connect(url, timeout=5)
    except asyncpg.InvalidAuthorizationSpecificationError:
        return Finding(name, what, "the login is refused", "mend role and password in CARE_DATABASE_URL")
    except asyncpg.InvalidCatalogNameError:
        return Finding(name, what, "there is no such database", "create it, owned by this service's role")
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        return Finding(name, what, f"away ({type(error).__name__})", "see that it runs where CARE_DATABASE_URL says")
    try:
        asked = time.time()
        clock, version, powerful = await db.fetchrow(
            "SELECT extract(epoch FROM clock_timestamp())::float8, current_setting('server_version_num')::int, rolsuper"
            " FROM pg_roles WHERE rolname = current_user"
        )
        difference = clock - (asked + time.time()) / 2
    finally:
        await db.close()
    if version < _OLDEST_POSTGRES:
        return Finding(name, what, f"PostgreSQL {version // 10000} is too old", "use 15 or newer")
    if abs(difference) > _CLOCK_SECONDS:
        return Finding(name, "clock", f"{difference:+.1f} s off the database's", "let NTP set both machines' clocks")
    if powerful:
        return Finding(name, what, "the role is a superuser", "give the service a role that owns its database only")
    return Finding(name, f"{what}, PostgreSQL {version // 10000}, clock {difference * 1000:+.0f} ms")


async def _schema(name: str, settings: Settings) -> Finding:
    service = topology.service(name)
    needed = migrations.needed(service.migrations)
    database = engine(settings, application="doctor")
    try:
        async with asyncio.timeout(6):
            found = await migrations.present(database)
    except Exception as error:
        return Finding(name, "schema", f"can't be read ({type(error).__name__})", "mend the database first")
    finally:
        await database.dispose()
    if found < needed:
        return Finding(name, "schema", f"is {found or 'empty'}, needed is {needed}", f"run: care migrate {name}")
    return Finding(name, f"schema {found}")


async def _bus(name: str, settings: Settings) -> Finding:
    kind, todo = ("Kafka", "CARE_KAFKA__BOOTSTRAP") if settings.kafka else ("bus", "CARE_BUS_URL")
    if settings.kafka is None and settings.bus_url is None:
        return Finding(name, "bus", "none is set", "set CARE_KAFKA__BOOTSTRAP")
    service = topology.service(name)
    wanted = [service.topic, *service.topics, f"care.dlq.{name}"]
    bus = bus_of(settings)
    try:
        async with asyncio.timeout(15):
            await bus.start()
            await bus.ensure_topics(wanted, PARTITIONS)
            # A group of its own that never commits: it shows what there is and disturbs nobody.
            reader = bus.reader("care.doctor", wanted)
            await reader.start()
            try:
                found = await _assigned(reader)
            finally:
                await reader.stop()
    except Exception as error:
        return Finding(name, kind, f"away ({type(error).__name__})", f"see that it runs where {todo} says")
    finally:
        await bus.stop()
    counts = {topic: sum(1 for each, _ in found if each == topic) for topic in wanted}
    if odd := [topic for topic, count in counts.items() if count != PARTITIONS]:
        return Finding(
            name,
            kind,
            f"{', '.join(odd)}: not {PARTITIONS} partitions",
            "make the topics anew: order hangs on the number",
        )
    return Finding(name, f"{kind}, {len(wanted)} topics")


async def _assigned(reader: Any) -> frozenset[tuple[str, int]]:
    before: frozenset[tuple[str, int]] = frozenset()
    while True:
        await reader.fetch(1, 0.3)
        found = frozenset(reader.assignment())
        if found and found == before:
            return found
        before = found


def _keys(name: str, settings: Settings) -> Sequence[Finding]:
    found = []
    own = settings.service_key_file
    if own is None or not own.exists():
        found.append(Finding(name, "own key", "is missing", "set CARE_SERVICE_KEY_FILE to this service's private JWK"))
    if settings.service_keys_file is None or not settings.service_keys_file.exists():
        found.append(Finding(name, "services' keys", "are missing", "set CARE_SERVICE_KEYS_FILE to everybody's JWKS"))
    elif own is not None and own.exists():
        try:
            public = KeySet.import_key_set(json.loads(settings.service_keys_file.read_text()))
            mine = OKPKey.import_key(json.loads(own.read_text()))
            if mine.thumbprint() != public.get_by_kid(name).thumbprint():
                raise ValueError
        except (ValueError, KeyError):
            found.append(
                Finding(name, "own key", "is another than the one that all know", "add its public half to the JWKS")
            )
    if name != GATEWAY.name and not settings.signing_secret:
        found.append(
            Finding(name, "signing secret", "is missing", "set CARE_SIGNING_SECRET, the same for all replicas")
        )
    return found or [Finding(name, "keys")]


async def _issuer(name: str, issuer: Issuer) -> Finding:
    what = f"issuer {issuer.issuer}"
    try:
        if issuer.jwks_file is not None:
            text = issuer.jwks_file.read_text()
        else:
            async with httpx2.AsyncClient(timeout=5) as client:
                answer = await client.get(issuer.jwks_url or "")
                answer.raise_for_status()
                text = answer.text
        KeySet.import_key_set(json.loads(text))
    except Exception as error:
        return Finding(
            name, what, f"its keys can't be read ({type(error).__name__})", "mend jwks_url or jwks_file in CARE_ISSUERS"
        )
    return Finding(name, what)


async def _peer(name: str, called: str, target: str) -> Finding:
    what, todo = f"calls {called}", f"see that {called} runs where CARE_PEERS says"
    if not target:
        return Finding(name, what, "no address is set", f"name {called} in CARE_PEERS")
    for address in target.removeprefix("ipv4:").removeprefix("dns:///").split(","):
        if not await is_serving(address):
            return Finding(name, what, f"{address} does not serve", todo)
    return Finding(name, what)


async def _reachable(name: str, what: str, url: str, todo: str) -> Finding:
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "smtp": 25, "smtps": 465}.get(parts.scheme, 80)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, port), 4)
        writer.close()
    except (OSError, TimeoutError) as error:
        return Finding(name, what, f"{parts.hostname}:{port} can't be reached ({type(error).__name__})", todo)
    return Finding(name, what)


async def _itself(name: str, settings: Settings) -> Finding:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
    todo = "start it (care serve), or read its log"
    if name == GATEWAY.name:
        try:
            async with httpx2.AsyncClient(timeout=4, trust_env=False) as client:
                answer = await client.get(f"http://{host}:{settings.port}/readyz")
            if answer.status_code == 200:
                return Finding(name, "serves")
            return Finding(name, "serves", f"not ready, waits for {', '.join(answer.json().get('for', []))}", todo)
        except (httpx2.HTTPError, ValueError) as error:
            return Finding(name, "serves", f"does not answer ({type(error).__name__})", todo)
    if await is_serving(f"{host}:{settings.health_port}"):
        return Finding(name, "serves")
    return Finding(name, "serves", f"nothing serves at port {settings.health_port}", todo)
